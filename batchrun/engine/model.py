"""Loads a transformers model, hooks its attention, and refuses what would be silently wrong."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)

from batchrun.engine import adapters
from batchrun.engine.attention import LayerSpec
from batchrun.engine.cpu_layers import NativeLayer, NativeLinear
from batchrun.engine.hook import (
    HOOK,
    Probe,
    StepLostError,
    UnsupportedError,
    set_attention,
    tell_beside,
)
from batchrun.engine.int8_gpu import why_not
from batchrun.engine.masks import PROBE, named_windows
from batchrun.engine.quantize import int8_weights
from batchrun.machine import multiplies_bfloat16
from batchrun.models import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


# What a model's own code raises over tokens, masks or positions that it does not expect.
OF_A_MODEL = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


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
    for key in ("vocab_size", "num_hidden_layers"):
        if not hasattr(config, key):
            raise _refused(name, f"its config has no {key}")
    if model.config.is_encoder_decoder:
        raise _refused(name, "it is an encoder-decoder, and batchrun runs decoders")
    limit, notes = _context(config, max_model_len)
    adapters.adapt(model)
    try:
        probe = _probed(model, limit)
    except UnsupportedError as error:
        raise _refused(name, str(error)) from error
    set_attention(model, HOOK)
    if config._attn_implementation != HOOK:
        raise _refused(name, "it does not take up another attention implementation")
    try:
        probe.hits.clear()
        _forward(model, probe)
    except UnsupportedError as error:
        raise _refused(name, str(error)) from error
    except OF_A_MODEL as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise _refused(
            name, f"its own code can't compute tokens of several rows together: {reason}"
        ) from error
    # Which see images, and do nothing without one.
    skipped = set(getattr(config, "cross_attention_layers", None) or ())
    expected = [i for i in range(config.num_hidden_layers) if i not in skipped]
    if sorted(probe.hits) != expected:
        missing = sorted(set(expected) - set(probe.hits))
        raise _refused(
            name,
            f"attention ran {len(probe.hits)} times for {len(expected)} layers"
            + (f" and not in layers {missing[:4]}" if missing else "")
            + "; layers with other state than keys and values are not supported",
        )
    if skipped:
        probe.renumber()
    layers = tuple(probe.layers[i] for i in range(len(expected)))
    _check_cache(model, layers, limit)
    sizes = [*named_windows(config), *(n for la in layers for n in (la.window, la.chunk) if n)]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        layers=layers,
        max_model_len=limit,
        max_window=max((n for n in sizes if n < limit), default=0),
        eos_ids=_eos_ids(model, tokenizer),
        notes=notes,
    )


def _check_cache(model: PreTrainedModel, layers: Sequence[LayerSpec], context: int) -> None:
    """Refuse a model whose cache forgets tokens that its masks let be seen.

    What `generate` gives then depends on where a prompt ends and its answer begins.
    """
    try:
        cache = DynamicCache(config=model.config.get_text_config())
    except OF_A_MODEL as error:
        raise _refused(type(model).__name__, f"it gets no cache of its own: {error}") from error
    for i, (kept, layer) in enumerate(zip(cache.layers, layers, strict=False)):
        window = getattr(kept, "sliding_window", None)
        if window and window < min(layer.window or layer.chunk or context, context):
            raise _refused(
                type(model).__name__,
                f"layer {i} attends to all tokens in a prompt, and to the last {window} in an "
                "answer",
            )


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts, whose routers rounding can sway."""
    kinds = {type(module).__name__.lower() for module in model.modules()}
    return any("expert" in kind or kind.endswith("moe") for kind in kinds)


def _probed(model: PreTrainedModel, context: int) -> Probe:
    """Have each layer's mask made once, and note on its attention module what it lets be seen.

    A model that can't be asked that way is left to the other gates.
    """
    probe = Probe(context)
    parameters = inspect.signature(model.forward).parameters.values()
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        tell_beside(model)
    set_attention(model, PROBE)
    with probe.masks, suppress(*OF_A_MODEL):
        try:
            _forward(model, probe)
        except StepLostError:
            tell_beside(model)
            _forward(model, probe)
    return probe


def _forward(model: PreTrainedModel, probe: Probe) -> None:
    with torch.inference_mode():
        ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
        model(
            input_ids=ids,
            position_ids=torch.arange(4, device=model.device)[None],
            use_cache=False,
            logits_to_keep=ids[0, :1],
            batchrun_step=probe,
        )


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
