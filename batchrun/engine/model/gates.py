"""The third gate: before a job starts, the engine's logits must match the model's own.

In a mixture of experts, rounding decides a router's choice between two nearly equal experts, and
everything after it differs. Where logits therefore say little, two other checks decide: does the
hooked model match the original in float32, where routers agree; and does each layer's attention
over slots match float32 attention on the very same queries, keys and values?
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from batchrun.engine.attention import KV, QKV, LayerAttention
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Request, SamplingParams, Segment, Sequence
from batchrun.engine.executor import TorchExecutor, kept
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.model.hook import HOOK, Step, set_attention
from batchrun.engine.model.judge import difference, tolerance
from batchrun.engine.model.prepare import OF_A_MODEL, LoadedModel, has_experts
from batchrun.engine.shortage import device_errors
from batchrun.engine.transfers import Transfers
from batchrun.errors import ModelError, said_by

_LEAST = 48  # tokens of a test prompt
_COMPARED = 4  # tokens: the last of the last chunk, and the three decodes after it
_TIMES_ROUNDING = 3  # the tolerance in multiples of the model's own rounding error, up to:
_MOST_TOLERANCE = 0.5  # attending to the wrong tokens makes a larger difference
_EAGER_SCORES = 1 << 28  # per layer; more would take over 1 GiB in float32


@dataclass(frozen=True)
class Reference:
    """The model's own logits for the test sequences.

    Args:
        logits: The last few of each sequence, `[n, V]`, with the model's own attention.
        rounding: How far they are from float32's, as a share of the largest: the rounding of many
            half-precision layers, added up. 0 in float32, or if float32 can't be computed.
        hooked: How far the hooked model's are from its own if both compute in float32. Only for a
            mixture of experts in half precision, where rounding picks experts and logits say
            little; None otherwise.
    """

    logits: tuple[torch.Tensor, ...]
    rounding: float
    hooked: float | None = None


def reference(loaded: LoadedModel) -> Reference:
    """Compute the reference; to be called before `optimize` replaces the model's modules.

    Raises:
        ModelError: The model's own logits are not finite, or its own code fails.
    """
    hooked, rounding = None, 0.0
    try:
        with device_errors(), torch.inference_mode(), _own_attention(loaded):
            logits = _own_logits(loaded)
    except OF_A_MODEL as error:
        raise ModelError(
            f"the architecture {loaded.architecture} is refused: its own code fails on a test "
            f"prompt: {said_by(error)}",
            hint="check its config.json: transformers can't run the model with it either",
        ) from error
    if not all(bool(each.isfinite().all()) for each in logits):
        raise ModelError(
            f"the model's own logits on a test prompt are not finite in {str(loaded.dtype)[6:]}",
            hint="its weights are damaged, or its numbers overflow this dtype: try "
            "--dtype bfloat16 or --dtype float32",
        )
    if loaded.dtype.itemsize < 4:
        with suppress(RuntimeError, TypeError, ValueError), torch.inference_mode():
            with _own_attention(loaded), in_float32(loaded.model):
                exact = _own_logits(loaded)
            rounding = max(map(difference, logits, exact))
            if has_experts(loaded.model):
                hooked = _hooked_in_float32(loaded, exact)
    return Reference(logits, rounding, hooked)


@contextmanager
def _own_attention(loaded: LoadedModel) -> Iterator[None]:
    """Have the model use eager attention, or SDPA if eager would take too much memory."""
    longest, layers = prompt_tokens(loaded), loaded.layers
    plain = not any(layer.sinks or layer.softcap for layer in layers)
    scores = longest**2 * max(layer.q_heads for layer in layers)
    fused = scores > _EAGER_SCORES and plain and loaded.model._supports_sdpa
    set_attention(loaded.model, "sdpa" if fused else "eager")
    try:
        yield
    finally:
        set_attention(loaded.model, HOOK)


def _own_logits(loaded: LoadedModel) -> tuple[torch.Tensor, ...]:
    found = []
    for sequence in sequences_of(loaded):
        ids = torch.tensor([sequence.request.prompt_ids], device=loaded.device)
        keep = torch.arange(ids.shape[1], device=loaded.device)[-_COMPARED:]
        output = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=keep)
        found.append(kept(output.logits[0], keep).float())
    return tuple(found)


def verify(
    loaded: LoadedModel,
    executor: TorchExecutor,
    space: KVSpace,
    chunk: int,
    want: Reference | None = None,
) -> float:
    """Compare packed, chunked logits over slots with the model's eager attention.

    Two sequences of different lengths, the longer one exceeding every window and two chunks, go
    through the slots interleaved in uneven chunks and end in single tokens.

    Args:
        loaded: The model.
        executor: The executor to judge.
        space: An idle KV space; idle again afterwards.
        chunk: Maximum tokens computed in a step.
        want: The model's `reference`; None to compute it now.

    Returns:
        The `difference` of the logits; if that is large in a mixture of experts, of attention.

    Raises:
        ModelError: They differ too much; the message names the architecture and the difference.
    """
    sequences = sequences_of(loaded)
    longest = sequences[0].num_tokens
    want = reference(loaded) if want is None else want
    worst = 0.0
    with torch.inference_mode():
        chunk = max(1, min(chunk // 2, longest // 3))
        for sequence, logits in through_slots(sequences, executor.logits, chunk, space):
            wanted = want.logits[sequence.request.row][-len(logits) :]
            worst = max(worst, difference(logits, wanted))
    most = tolerance(loaded.dtype).slots
    if want.hooked is None:
        most = max(most, min(_MOST_TOLERANCE, _TIMES_ROUNDING * want.rounding))
    elif most < worst < math.inf and want.hooked <= tolerance(torch.float32).slots:
        worst = _attention_alone(loaded, executor, space, chunk)
    if worst == math.inf:
        raise ModelError(
            f"the architecture {loaded.architecture} is refused: on a test prompt of {longest} "
            "tokens its logits over contiguous slots are not finite, but its own are",
            hint="try another --dtype or --attention",
        )
    if worst > most:
        raise ModelError(
            f"the architecture {loaded.architecture} is refused: on a test prompt of {longest} "
            f"tokens its logits over contiguous slots differ from its own by {worst:.2g} of the "
            f"largest logit, more than {most:.2g}",
            hint="its attention is not supported; batchrun doctor lists architectures that are",
        )
    return worst


def _hooked_in_float32(loaded: LoadedModel, want: tuple[torch.Tensor, ...]) -> float:
    """How far the hooked model's logits are from `want`, its own, both computed in float32."""
    sequences = sequences_of(loaded)
    views, transfers = plain_views(loaded, sequences), Transfers(loaded.device)
    executor = TorchExecutor(loaded, views, [], SDPA(), transfers)
    chunk = max(1, sequences[0].num_tokens // 3)
    with torch.inference_mode(), in_float32(loaded.model):
        found = through_slots(sequences, executor.logits, chunk)
    return max(difference(got, want[s.request.row][-len(got) :]) for s, got in found)


def _attention_alone(
    loaded: LoadedModel, executor: TorchExecutor, space: KVSpace, chunk: int
) -> float:
    """The largest difference between a layer's attention and float32 attention on the same input.

    Meanwhile the executor does not replay recorded steps.
    """
    sequences = sequences_of(loaded)
    judge = _Judge(executor, plain_views(loaded, sequences))
    as_it_was = executor.graphs, executor.pieces, executor.wrap
    executor.graphs, executor.pieces, executor.wrap = None, None, judge.watch
    try:
        with torch.inference_mode():
            through_slots(sequences, judge.logits, chunk, space)
    finally:
        executor.graphs, executor.pieces, executor.wrap = as_it_was
    return judge.worst


class _Judge:
    """Repeats an executor's attention in float32, and compares."""

    def __init__(self, executor: TorchExecutor, views: Seq[KV]) -> None:
        self.worst = 0.0
        self._executor = executor
        self._views = views
        self._backend = SDPA()
        self._segments: list[Segment] = []
        self._step: Step | None = None

    def logits(self, segments: Seq[Segment]) -> torch.Tensor:
        """See `TorchExecutor.logits`."""
        self._segments = [replace(s, slot=s.key) for s in segments]  # a view's slot is the row
        return self._executor.logits(segments)

    def watch(self, step: Step) -> Step:
        """Stand between the model and a step."""
        self._step = step
        return self

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        """See `Step.attend`."""
        assert self._step is not None
        out = self._step.attend(layer_index, layer, new)
        query, key, value = new
        keys, values = self._views[layer_index]
        at = 0
        for s in self._segments:
            written, at = slice(at, at + s.length), at + s.length
            keys[s.slot, s.start : s.start + s.length] = key[written].float()
            values[s.slot, s.start : s.start + s.length] = value[written].float()
        self._backend.plan(self._segments)
        want = self._backend.run(layer, query.float(), (keys, values))
        self.worst = max(self.worst, difference(out, want))
        return out


# --- test sequences ---


def prompt_tokens(loaded: LoadedModel) -> int:
    """Tokens of the longer test prompt: more than the longest window, if there is one."""
    return min(loaded.max_model_len, max(loaded.max_window + 19, _LEAST))


def budget_too_small(tokens: int, refusal: str = "") -> ModelError:
    """The error for KV memory that is too small for a test prompt.

    Args:
        tokens: Tokens of the prompt.
        refusal: Why the machine has no memory; empty if the budget is too small.
    """
    if refusal:
        return ModelError(f"there is no memory for a test prompt of {tokens} tokens: {refusal}")
    return ModelError(
        f"the KV budget can't hold a test prompt of {tokens} tokens", hint="raise --kv-budget"
    )


def sequences_of(loaded: LoadedModel, longest: int = 0) -> list[Sequence]:
    """Two test sequences, the first of that length, or of `prompt_tokens`; the other is shorter."""
    longest = longest or prompt_tokens(loaded)
    vocab = int(loaded.model.config.get_text_config().vocab_size)
    rng = random.Random(0)
    return [
        Sequence(Request(i, 0, tuple(rng.randrange(vocab) for _ in range(n)), SamplingParams(), 0))
        for i, n in enumerate([longest, max(2, longest * 2 // 3)])
    ]


def through_slots(
    sequences: list[Sequence],
    compute: Callable[[Seq[Segment]], torch.Tensor],
    chunk: int,
    space: KVSpace | None = None,
) -> list[tuple[Sequence, torch.Tensor]]:
    """Compute sequences interleaved in chunks, then their last three tokens one by one.

    Args:
        sequences: What to compute.
        compute: Like `TorchExecutor.logits`.
        chunk: Tokens per chunk.
        space: Provides slots and memory; None gives slot i to the i-th sequence.

    Returns:
        Each sequence that got a slot, and the logits `[n, V]` of its last tokens.
    """
    for i, sequence in enumerate(sequences):
        sequence.slot = i if space is None else space.open(sequence.num_tokens)
    # With a single slot there is no second sequence to mix in.
    sequences = [s for s in sequences if s.slot is not None]  # each at the index of its row
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(s.num_computed_tokens < s.num_tokens for s in sequences):
        segments = []
        for sequence in sequences:
            start = sequence.num_computed_tokens
            length = min(max(1, sequence.num_tokens - 3 - start), chunk)
            if start < sequence.num_tokens and sequence.slot is not None:
                if space is not None and not space.ensure(sequence.slot, start + length):
                    raise budget_too_small(sequence.num_tokens, space.refusal)
                ids = sequence.token_ids(start, length)
                segments.append(
                    Segment(sequence.slot, start, length, True, ids, key=sequence.request.row)
                )
        for segment, row in zip(segments, compute(segments), strict=True):
            sequences[segment.key].num_computed_tokens += segment.length
            logits[segment.key].append(row)
    if space is not None:
        for sequence in sequences:
            if sequence.slot is not None:
                space.close(sequence.slot, 0)
        space.retire(0)
    return [(s, torch.stack(r[-_COMPARED:])) for s, r in zip(sequences, logits, strict=True)]


def plain_views(loaded: LoadedModel, sequences: Seq[Sequence]) -> list[KV]:
    """Each layer's keys and values in ordinary float32 memory, one slot per sequence."""
    slots = len(sequences), max(s.num_tokens for s in sequences)

    def zeros(heads: int, dim: int) -> torch.Tensor:
        return torch.zeros(*slots, heads, dim, dtype=torch.float32, device=loaded.device)

    return [(zeros(s.kv_heads, s.k_dim), zeros(s.kv_heads, s.v_dim)) for s in loaded.layers]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Run each module in float32, keeping a second copy only of the running module's weights."""
    halves: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                halves[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in halves:
                parameter.data = halves.pop(parameter)

    hooks = [m.register_forward_pre_hook(widen) for m in model.modules()]
    hooks += [m.register_forward_hook(restore) for m in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, half in halves.items():  # left by a forward that failed
            parameter.data = half
