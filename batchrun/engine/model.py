"""Loads a transformers model, hooks its attention, and refuses what would be silently wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from batchrun.engine.attention import LayerAttention, LayerSpec
from batchrun.engine.cpu_layers import NativeLayer, NativeLinear
from batchrun.engine.int8_gpu import why_not
from batchrun.engine.quantize import int8_weights
from batchrun.machine import multiplies_bfloat16
from batchrun.models import ModelError

HOOK = "batchrun"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tensors that models hand to every attention function and that causal attention does not need.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings"}


class Step(Protocol):
    """What the hook calls: attention of the step that is being computed."""

    def attend(
        self,
        layer_index: int,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Attend one layer: `[T, Hq, Dk]`, `[T, Hkv, Dk]`, `[T, Hkv, Dv]` to `[T, Hq, Dv]`."""


def _hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batchrun_step: Step | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer, tensors `[1, H, T, D]`."""
    unknown = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k not in _HARMLESS]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    index = getattr(module, "layer_idx", None)
    reason = None
    if batchrun_step is None:
        reason = "it does not pass keyword arguments on to its attention"
    elif attention_mask is not None:
        reason = "it makes an attention mask of its own"
    elif unknown:
        reason = f"its attention takes {', '.join(unknown)}"
    elif not causal:
        reason = "its attention is not causal"
    elif index is None:
        reason = "its attention modules do not know their layer"
    if reason is not None or batchrun_step is None or index is None:
        raise _UnsupportedError(f"{reason}, which contiguous-slot attention does not know")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    layer = LayerAttention(scale, sliding_window or None, softcap, s_aux)
    out = batchrun_step.attend(
        index,
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
    )
    return out[None], None


class _UnsupportedError(Exception):
    """The hook met something it would compute wrongly."""


AttentionInterface.register(HOOK, _hook)


@dataclass(frozen=True)
class LoadedModel:
    """A model that passed the first two gates; `canary.verify` is the third.

    Args:
        model: The transformers model, in evaluation mode, its attention hooked.
        tokenizer: Its tokenizer; None for models made from a config.
        layers: What each layer asks of attention.
        max_model_len: Tokens of prompt and output together at most.
        max_window: Longest sliding window of any layer, 0 without one.
        eos_ids: Tokens that end a completion.
        notes: What the user should know, one sentence each.
    """

    model: PreTrainedModel
    tokenizer: Any
    layers: tuple[LayerSpec, ...]
    max_model_len: int
    max_window: int
    eos_ids: frozenset[int]
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The model's class, as in its config's `architectures`."""
        return type(self.model).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, activations, keys and values."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def weights_bytes(self) -> int:
        """Bytes of parameters and buffers, tied ones once, and of weights that were packed."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        native = (m for m in self.model.modules() if isinstance(m, (NativeLayer, NativeLinear)))
        return sum(m.nbytes for m in native) + sum(
            {t.data_ptr() or id(t): t.nbytes for t in tensors}.values()  # 0 on torch's meta device
        )


def load(
    path: str,
    *,
    name: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load model and tokenizer from a local folder or a hub id.

    Args:
        path: A folder with safetensors weights, or a hub id.
        name: What to call it in messages.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: on a GPU the config's; on a CPU bfloat16
            where it has instructions for it, else float32.
        quantize: `int8` for weights of 8 bits, or None.
        device: A torch device.
        trust_remote_code: Whether the model's own Python code may run.
        max_model_len: Context length wanted; the model's own bounds it.

    Raises:
        ModelError: It can't be loaded, or its architecture is refused.
    """
    name = name or path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        wanted = choose_dtype(dtype, config, device)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except CANNOT_LOAD as error:
        raise cannot_load(name, error) from error
    if quantize:
        int8_weights(model)
    model = model.to(device)  # type: ignore[arg-type]  # transformers wraps it untyped
    loaded = prepare(model, tokenizer, max_model_len=max_model_len)
    reason = why_not(loaded.device, wanted) if quantize and loaded.device.type == "cuda" else None
    if reason is None:
        return loaded
    note = f"weights of 8 bits save memory and cost time here: each step widens them, as {reason}"
    return replace(loaded, notes=(*loaded.notes, note))


CANNOT_LOAD = (OSError, ValueError, KeyError, ImportError)  # of transformers


def cannot_load(name: str, error: Exception) -> ModelError:
    """The error for a model that transformers can't load."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return ModelError(
        f"the model {name} can't be loaded: {first}",
        hint="it must be a causal language model of a released transformers architecture, "
        "with safetensors weights and a tokenizer; see `batchrun doctor`",
    )


def prepare(
    model: PreTrainedModel, tokenizer: Any = None, *, max_model_len: int | None = None
) -> LoadedModel:
    """Hook a model's attention and learn its KV shapes (gates one and two).

    Raises:
        ModelError: The architecture is refused; the message names it and the reason.
    """
    model.eval()
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or not model._supports_attention_backend:
        raise _refused(name, "it does not declare support for attention backends")
    model.set_attn_implementation(HOOK)
    if config._attn_implementation != HOOK:
        raise _refused(name, "it does not take up another attention implementation")
    probe = _Probe()
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
            positions = torch.arange(4, device=model.device)[None]
            model(input_ids=ids, position_ids=positions, use_cache=False, batchrun_step=probe)
    except _UnsupportedError as error:
        raise _refused(name, str(error)) from error
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        raise _refused(name, f"a forward pass over packed tokens fails: {error}") from error
    expected = list(range(config.num_hidden_layers))
    if sorted(probe.hits) != expected:
        missing = sorted(set(expected) - set(probe.hits))
        raise _refused(
            name,
            f"attention ran {len(probe.hits)} times for {len(expected)} layers"
            + (f" and not in layers {missing[:4]}" if missing else "")
            + "; layers with other state than keys and values are not supported",
        )
    limit, notes = _context(config, max_model_len)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        layers=tuple(probe.layers[i] for i in expected),
        max_model_len=limit,
        max_window=max(layer.window or 0 for layer in probe.layers.values()),
        eos_ids=_eos_ids(model, tokenizer),
        notes=notes,
    )


class _Probe:
    """A step that records what each layer asks for, and computes nothing."""

    def __init__(self) -> None:
        self.hits: list[int] = []
        self.layers: dict[int, LayerSpec] = {}

    def attend(
        self,
        layer_index: int,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        self.hits.append(layer_index)
        self.layers[layer_index] = LayerSpec(
            q_heads=query.shape[1],
            kv_heads=key.shape[1],
            k_dim=key.shape[2],
            v_dim=value.shape[2],
            scale=layer.scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=layer.sinks is not None,
        )
        return value.new_zeros(*query.shape[:2], value.shape[2])


def sampling_defaults(model: PreTrainedModel) -> dict[str, Any]:
    """Sampling parameters that the model's generation config asks for; greedy if it does not."""
    config = model.generation_config
    if config is None:
        return {}
    names = ["repetition_penalty"]
    if config.do_sample:
        names += ["temperature", "top_k", "top_p", "min_p"]
    found = {n: getattr(config, n, None) for n in names}
    found["max_tokens"] = config.max_new_tokens
    if config.do_sample and found.get("temperature") is None:
        found["temperature"] = 1.0
    return {k: v for k, v in found.items() if v is not None}


def _refused(name: str, reason: str) -> ModelError:
    return ModelError(
        f"the architecture {name} is refused: {reason}",
        hint="`batchrun doctor` lists architectures that are known to work",
    )


def choose_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The dtype that `--dtype` means for a model with this config: see `load`."""
    if name in DTYPES:
        return DTYPES[name]
    if device == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    found = config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _rope_settings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every rope setting in a config, which may have one for each type of layer."""
    if isinstance(value, Mapping):
        if "rope_type" in value:
            yield value
        for inner in value.values():
            yield from _rope_settings(inner)


def _context(config: Any, wanted: int | None) -> tuple[int, tuple[str, ...]]:
    """The context length to use, and notes on why it is not the model's or the user's."""
    limit = getattr(config, "max_position_embeddings", None) or wanted or 8192
    notes = []
    for rope in _rope_settings(getattr(config, "rope_parameters", None)):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if rope["rope_type"] == "longrope" and original and original < limit:
            # Its frequencies depend on the longest sequence in the batch: beyond the original
            # length one row would change another row's tokens.
            notes.append(
                f"context limited to {original} of {limit} tokens: longrope changes its "
                "frequencies beyond that by the longest row of a batch"
            )
            limit = int(original)
    if wanted is not None and wanted > limit:
        raise ModelError(
            f"--max-model-len {wanted} is more than the {limit} tokens this model holds",
            hint=f"use --max-model-len {limit} or less",
        )
    return int(wanted or limit), tuple(notes)


def _eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Where `generate` would stop: the generation config's tokens, else the tokenizer's."""
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
