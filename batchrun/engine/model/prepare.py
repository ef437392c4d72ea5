"""Hooks a transformers model's attention, and refuses what would be silently wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from batchrun.engine.attention import LayerSpec
from batchrun.engine.cpu.layers import NativeLayer
from batchrun.engine.cpu.linear import NativeLinear
from batchrun.engine.model import adapters
from batchrun.engine.model.context import context_length
from batchrun.engine.model.generation import eos_ids
from batchrun.engine.model.hook import HOOK, Probe, UnsupportedError, attending, set_attention
from batchrun.engine.model.masks import PROBE, NoNumbers, named_windows
from batchrun.engine.shortage import is_shortage
from batchrun.errors import ModelError, first_line


@dataclass(frozen=True)
class LoadedModel:
    """A model that passed the first two gates; `gates.verify` is the third.

    Args:
        model: The transformers model, in evaluation mode, its attention hooked.
        tokenizer: Its tokenizer; None for models made from a config.
        layers: What each layer asks of attention.
        max_model_len: Maximum tokens of prompt and output together.
        max_window: Longest window or chunk below `max_model_len`, 0 if there is none.
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
        """Bytes of parameters, buffers and packed weights; tied ones count once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        native = (m for m in self.model.modules() if isinstance(m, (NativeLayer, NativeLinear)))
        return sum(m.nbytes for m in native) + sum(
            {t.data_ptr() or id(t): t.nbytes for t in tensors}.values()  # 0 on torch's meta device
        )


# What a model's own code raises on tokens, masks or positions that it does not expect.
OF_A_MODEL = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)


def prepare(
    model: PreTrainedModel, tokenizer: Any = None, *, max_model_len: int | None = None
) -> LoadedModel:
    """Hook a model's attention and learn its KV shapes (gates one and two).

    Raises:
        ModelError: The architecture is refused; the message names it and the reason.
    """
    try:
        return _prepare(model, tokenizer, max_model_len)
    except UnsupportedError as error:
        raise ModelError(
            f"the architecture {type(model).__name__} is refused: {error}",
            hint="`batchrun doctor` lists architectures that are known to work",
        ) from error


def _prepare(model: PreTrainedModel, tokenizer: Any, max_model_len: int | None) -> LoadedModel:
    model.eval()
    config = model.config.get_text_config()
    for key in ("vocab_size", "num_hidden_layers"):
        if not hasattr(config, key):
            raise UnsupportedError(f"its config has no {key}")
        if not isinstance(found := getattr(config, key), int) or found < 1:
            raise UnsupportedError(f"its config says that {key} is {found!r}")
    if model.config.is_encoder_decoder:
        raise UnsupportedError("it is an encoder-decoder, and batchrun runs decoder-only models")
    if model.device.type == "meta":  # where the number of tokens per expert is unknown
        model.set_experts_implementation("batched_mm")
    limit, notes = context_length(config, max_model_len)
    adapters.adapt(model)
    probe = _probed(model, limit)
    set_attention(model, HOOK)
    if config._attn_implementation != HOOK:
        raise UnsupportedError("its attention implementation can't be replaced")
    probe.makes_masks = False
    probe.hits.clear()
    try:
        _forward(model, probe, position_ids=torch.arange(4, device=model.device)[None])
    except OF_A_MODEL as error:
        if is_shortage(error):
            raise
        raise UnsupportedError(
            f"its own code can't compute tokens of several rows together: {first_line(error)}"
        ) from error
    # Cross-attention layers see images, and do nothing without one.
    skipped = set(getattr(config, "cross_attention_layers", None) or ())
    expected = [i for i in range(config.num_hidden_layers) if i not in skipped]
    _check_hits(probe.hits, expected)
    if skipped:
        probe.renumber()
    layers = tuple(probe.layers[i] for i in range(len(expected)))
    _check_cache(config, layers, limit)
    sizes = [*named_windows(config), *(n for la in layers for n in (la.window, la.chunk) if n)]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        layers=layers,
        max_model_len=limit,
        max_window=max((n for n in sizes if n < limit), default=0),
        eos_ids=eos_ids(model, tokenizer),
        notes=notes,
    )


def _check_hits(hits: Sequence[int], expected: Sequence[int]) -> None:
    """Refuse a model whose layers do not each attend once."""
    if not hits:
        raise UnsupportedError(
            "its layers compute attention in their own code, which can't be replaced"
        )
    missing = [str(i) for i in expected if i not in hits]
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        which = f"layer {shown} has" if len(missing) == 1 else f"layers {shown} have"
        raise UnsupportedError(f"{which} state other than keys and values")
    if sorted(hits) != expected:
        raise UnsupportedError(
            f"its {len(expected)} layers compute attention {len(hits)} times, not once each"
        )


def _check_cache(config: Any, layers: Sequence[LayerSpec], context: int) -> None:
    """Refuse a model whose cache forgets tokens that its masks let queries see.

    What `generate` returns then depends on where the prompt ends and the answer begins.
    """
    try:
        cache = DynamicCache(config=config)
    except OF_A_MODEL as error:
        raise UnsupportedError(f"transformers can't make a cache for it: {error}") from error
    for i, (kept, layer) in enumerate(zip(cache.layers, layers, strict=False)):
        window = getattr(kept, "sliding_window", None)
        if window and window < min(layer.window or layer.chunk or context, context):
            raise UnsupportedError(
                f"layer {i} attends to all tokens in a prompt, but to the last {window} in an "
                "answer"
            )


def has_experts(model: nn.Module) -> bool:
    """Whether a model is a mixture of experts, whose routers rounding can sway."""
    kinds = {type(module).__name__.lower() for module in model.modules()}
    return any("expert" in kind or kind.endswith("moe") for kind in kinds)


def _probed(model: PreTrainedModel, context: int) -> Probe:
    """Have each layer's mask made once, and note on its attention module which keys it shows.

    A model that can't be probed that way is left to the other gates.
    """
    probe = Probe(context)
    set_attention(model, PROBE)
    try:
        with NoNumbers():
            _forward(model, probe)  # without positions, or transformers looks for several sequences
    except OF_A_MODEL as error:
        if is_shortage(error):
            raise
    return probe


def _forward(model: PreTrainedModel, probe: Probe, **others: torch.Tensor) -> None:
    """Run the model on four tokens."""
    ids = torch.zeros(1, 4, dtype=torch.int64, device=model.device)
    with torch.inference_mode(), attending(probe):
        model(input_ids=ids, use_cache=False, logits_to_keep=ids[0, :1], **others)
