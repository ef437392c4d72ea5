"""Runs step plans on a device: tokens in, keys and values into the slots, next tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from batchrun.engine import pieces
from batchrun.engine.attention import KV, QKV, Attention, AttentionBackend, LayerAttention
from batchrun.engine.core import Candidates, Segment
from batchrun.engine.graphs import DecodeGraphs, Record
from batchrun.engine.kvformat import PLAIN, KVFormat, Write
from batchrun.engine.logits import LogitsConfig
from batchrun.engine.model.hook import Step, attending
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.plan import Masks, StepOutput, StepPlan, Targets, targets_of, wanted_logits
from batchrun.engine.processors import LogitsRow
from batchrun.engine.sampling import Sampler, score
from batchrun.engine.shortage import device_errors
from batchrun.engine.transfers import Download, Transfers

# Bytes of keys and values that draft tokens in a recorded step may read again: an H200 should take
# half a millisecond, less than launching a step in pieces takes.
_REREAD = 2 << 30
_UNKNOWN = (0,)  # stands in for a token that only the device knows


@dataclass(slots=True)
class Ticket:
    """A launched step, to be sampled and then collected. It has ended once its tokens arrive.

    The executor keeps what it needs here: the plan's segments, their logits `[N, V]` until they are
    sampled, the sampled segments' slots on the device, which rows belong to beams, and whether
    known tokens are scored.
    """

    step: int
    segments: Seq[Segment] = ()
    logits: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    beams: Seq[int] = ()
    scored: bool = False
    tokens: Download | None = None


class Executor(Protocol):
    """Computes steps in launch order: `launch`, `sample` and `collect` for each.

    Attributes:
        lag: Steps that may be sampled but not collected when the next one is launched; 0 if
            `launch` and `sample` compute synchronously.
        on_host: Whether `sample` computes here and now, so that it may call `Masks.refused`.
    """

    lag: int
    on_host: bool

    def seconds(self) -> tuple[float, float]:
        """The device's time in steps so far, and between steps: see `EngineStats`."""

    def launch(self, plan: StepPlan) -> Ticket:
        """Start the forward pass of a step whose memory is in place."""

    def sample(self, ticket: Ticket, masks: Masks | None = None) -> None:
        """Start choosing the step's tokens; called before the next step is launched.

        `masks` say which tokens constrained rows allow.
        """

    def collect(self, ticket: Ticket) -> StepOutput:
        """Wait until the oldest uncollected step has ended; returns its tokens.

        After that, the memory it read may be changed or unmapped, even if it sampled nothing.
        """

    def busy(self) -> bool:
        """Whether the device is still computing launched work."""


class TorchExecutor:
    """Runs the model's own forward over packed tokens `[1, T]`.

    Args:
        loaded: The model.
        views: Each layer's keys and values, `[num_slots, slot_tokens, kv_heads, dim]`.
        slabs: Each slab group's bytes `[planes, bytes]`, within which copies are made.
        backend: The attention kernels.
        transfers: Moves data to the device and back.
        lag: See `Executor`; 0 unless `transfers` is asynchronous.
        relieve: Called when the device has no memory for a step, which is then retried once: waits
            for the device and frees unused memory.
        config: What the model's generation config asks of logits.
        kv_format: How keys and values are stored in `views`; one of the backend's formats.

    Attributes:
        wrap: Wraps the attention of a step, to observe it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        views: Seq[KV],
        slabs: Seq[torch.Tensor],
        backend: AttentionBackend,
        transfers: Transfers,
        *,
        lag: int = 0,
        relieve: Callable[[], None] = lambda: None,
        config: LogitsConfig | None = None,
        kv_format: KVFormat = PLAIN,
    ) -> None:
        self.loaded = loaded
        self.backend = backend
        self.transfers = transfers
        self.lag, self.on_host = lag, transfers.on_host
        self.graphs: DecodeGraphs | None = None
        self.pieces: pieces.PieceGraphs | None = None
        self.wrap: Callable[[Step], Step] = lambda step: step
        self._relieve = relieve
        self._collected = 0  # the last collected step
        self._views, self._slabs = views, slabs
        if kv_format.name not in backend.kv_formats:
            raise ValueError(f"{backend.name} can't read {kv_format.name} keys and values")
        self._writes = [(kv_format.writer(k), kv_format.writer(v)) for k, v in views]
        self._slot_tokens = views[0][0].shape[1]
        num_slots = views[0][0].shape[0]
        self.sampler = Sampler(num_slots, transfers.upload, loaded.eos_ids, config)
        # The last token sampled in each slot; the next step reads it here, not from the host. One
        # place more takes the others of slots with draft tokens.
        self._last = torch.zeros(num_slots + 1, dtype=torch.int64, device=loaded.device)

    def seconds(self) -> tuple[float, float]:
        """See `Executor.seconds`."""
        return self.transfers.device_seconds, self.transfers.idle_seconds

    def launch(self, plan: StepPlan) -> Ticket:
        """See `Executor.launch`."""
        self.sampler.enter(plan.new)
        ticket = Ticket(plan.step, plan.segments)
        with self._step():
            self._copy(plan)
            if self.lag:  # the next step reads their tokens on the device
                slots = _last_places(plan.segments, len(self._last) - 1)
                ticket.slots = self.transfers.upload(np.array(slots, np.int64))
            try:
                ticket.logits = self._logits(plan.segments)
            except torch.OutOfMemoryError:
                self._relieve()
                # Safe to repeat: it writes the same numbers to the same places.
                ticket.logits = self._logits(plan.segments)
        return ticket

    def sample(self, ticket: Ticket, masks: Masks | None = None) -> None:
        """See `Executor.sample`."""
        rows, targets = self.sampler.prepare(ticket.segments), targets_of(ticket.segments)
        chosen: tuple[torch.Tensor, ...] = ()
        with self._step(more=True):
            if rows or targets is not None:
                chosen = self._chosen(ticket, rows, targets, masks)
            if rows:
                if ticket.slots is not None:  # a row without a token has ended anyway
                    self._last.index_copy_(0, ticket.slots, chosen[0].clamp_min(0))
                self.sampler.accept(chosen[0], rows)
            if chosen[2:]:
                ticket.beams = [i for i, row in enumerate(rows) if row.params.beams]
            ticket.scored = targets is not None
            ticket.tokens = self.transfers.download(*chosen)

    def _chosen(
        self, ticket: Ticket, rows: Seq[LogitsRow], targets: Targets, masks: Masks | None
    ) -> tuple[torch.Tensor, ...]:
        """See `Sampler.sample`; then the scores. Retries once if the device runs out of memory."""
        assert ticket.logits is not None
        try:
            return self._found(ticket.logits, rows, targets, masks)
        except torch.OutOfMemoryError:
            ticket.logits = None
            self._relieve()
            again = self._logits(ticket.segments)  # the old ones changed
            return self._found(again, rows, targets, masks)
        finally:
            ticket.logits = None

    def _found(
        self, logits: torch.Tensor, rows: Seq[LogitsRow], targets: Targets, masks: Masks | None
    ) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = ()
        if rows:
            found = self.sampler.sample(logits[: len(rows)], rows, masks)
        if targets is not None:
            places, tokens = self.transfers.upload(targets)
            found += (score(logits[len(rows) :], places, tokens),)
        return found

    def collect(self, ticket: Ticket) -> StepOutput:
        """See `Executor.collect`."""
        assert ticket.tokens is not None
        with device_errors():
            found = ticket.tokens.get()
        scores = found.pop() if ticket.scored else ()
        token_ids, *others = found or [[]]
        self._collected = ticket.step
        logprobs, *pairs = others or [[]]
        candidates: list[Candidates] = [()] * len(token_ids) if ticket.beams else []
        for row, found in zip(ticket.beams, pairs.pop(0) if ticket.beams else (), strict=True):
            candidates[row] = _of_tokens(found)
        likeliest = map(_of_tokens, pairs[0]) if pairs else ()
        return StepOutput(
            *(ticket.step, tuple(token_ids), tuple(logprobs)),
            *(tuple(candidates), tuple(likeliest), tuple(scores)),
        )

    def busy(self) -> bool:
        """See `Executor.busy`."""
        return self.transfers.busy()

    def logits(self, segments: Seq[Segment]) -> torch.Tensor:
        """Compute the segments alone; returns the logits that they want, `[N, V]`: see `_wanted`.

        They belong to the caller, whereas a recorded step's own logits are overwritten by the next.
        """
        with self._step():
            logits = self._logits(segments).clone()
        self.transfers.drain()
        return logits

    def capture(self, sizes: Seq[int], scratch: int, record: Record) -> None:
        """Record steps of `sizes` single tokens as graphs, which then replace eager steps.

        Args:
            sizes: Batch sizes; a step of another size is padded to the next larger one.
            scratch: A slot with memory for one token, used by the rows that pad a batch.
            record: See `DecodeGraphs`.
        """
        filler = Segment(scratch, 0, 1, sampled=True)

        def prepare(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.backend.plan([filler] * size, fixed=True)
            upload, filled = self.transfers.upload, [filler] * size
            inputs = upload(self._pack(filled)), upload(wanted_logits(filled))
            self.transfers.started()
            return inputs

        a_token = sum(t.shape[2] * t.shape[3] * t.element_size() for kv in self._views for t in kv)
        with self._step():
            self.graphs = DecodeGraphs(
                self._forward, prepare, sizes, filler, record, most_reread=_REREAD // a_token
            )

    def record_pieces(self, scratch: int, **options: Any) -> None:
        """From now on, record steps of all kinds, except for their attention.

        Args:
            scratch: As in `capture`: the slot for the tokens that pad a step.
            options: Arguments of `PieceGraphs`: `most`, `sampled`, `record` and `log`.
        """
        device = self.loaded.device
        self.pieces = pieces.PieceGraphs(self._forward, self.backend, device, **options)
        self._filler = (0, 0, scratch * self._slot_tokens, -1)

    def _copy(self, plan: StepPlan) -> None:
        if plan.copies:
            with self.transfers.copying(beside=plan.copies_after <= self._collected):
                for copy in plan.copies:
                    slab, size = self._slabs[copy.group], copy.nbytes
                    source = slab[:, copy.source : copy.source + size]
                    slab[:, copy.target : copy.target + size].copy_(source, non_blocking=True)

    @contextmanager
    def _step(self, *, more: bool = False) -> Iterator[None]:
        with device_errors(), torch.inference_mode(), self.transfers.step(more=more):
            yield

    def _logits(self, segments: Seq[Segment]) -> torch.Tensor:
        """See `logits`; called within a step."""
        graphs, upload = self.graphs, self.transfers.upload
        singles = None if graphs is None else graphs.fitting(segments)
        if graphs is not None and singles is not None:
            filled = graphs.fill_up(singles)
            self.backend.plan(filled, fixed=True)
            upload(self._pack(filled), graphs.inputs(len(filled)))
            places: torch.Tensor | slice = slice(len(singles))
            if len(singles) > len(segments):
                places = upload(wanted_logits(segments))
            self.transfers.started()
            return graphs.replay(len(filled))[places]
        self.backend.plan(segments)
        packed, last = self._pack(segments), wanted_logits(segments)
        size = None if self.pieces is None else self.pieces.size_of(packed.shape[1], len(last))
        if size is not None:
            return self._in_pieces(size, packed, last)
        inputs = upload(packed), upload(last)
        self.transfers.started()
        return self._forward(*inputs)

    def _in_pieces(
        self, size: int, packed: np.ndarray[Any, Any], last: np.ndarray[Any, Any]
    ) -> torch.Tensor:
        """As `_logits`, for a step padded to `size` tokens."""
        assert self.pieces is not None
        count = packed.shape[1]
        filled = np.repeat(np.array(self._filler)[:, None], size, axis=1)
        filled[:, :count] = packed
        inputs = self.pieces.inputs(size)
        wanted = np.zeros(len(inputs[1]), np.int64)
        wanted[: len(last)] = last
        for array, to in zip((filled, wanted), inputs, strict=True):
            self.transfers.upload(array, to)
        self.transfers.started()
        return self.pieces.compute(size, count)[: len(last)]

    def _pack(self, segments: Seq[Segment]) -> np.ndarray[Any, Any]:
        """The step's tokens.

        Returns:
            `[4, T]` int64: token ids; positions; rows in the slots taken as one tensor of tokens;
            and, for a token that only the device knows, the slot that it was sampled in, else -1.
        """
        ids: list[int] = []
        for segment in segments:
            ids += segment.token_ids or _UNKNOWN
        slots = np.array([s.slot for s in segments], np.int64)
        starts = np.array([s.start for s in segments], np.int64)
        each = np.empty((3, len(segments)), np.int64)
        each[0], each[1] = starts, slots * self._slot_tokens + starts
        each[2] = np.where([not s.token_ids for s in segments], slots, -1)
        packed = np.empty((4, len(ids)), np.int64)
        packed[0] = ids
        if len(ids) == len(segments):
            packed[1:] = each
        else:
            lengths = np.array([s.length for s in segments])
            packed[1:] = np.repeat(each, lengths, axis=1)
            packed[1:3] += np.arange(len(ids)) - np.repeat(lengths.cumsum() - lengths, lengths)
        return packed

    def _forward(
        self, packed: torch.Tensor, last: torch.Tensor, attention: Attention | None = None
    ) -> torch.Tensor:
        """Run the model over packed tokens `[4, T]`; returns logits `[N, V]` at `last` `[N]`."""
        ids, positions, rows, sources = packed
        ids = torch.where(sources < 0, ids, self._last[sources.clamp_min(0)])
        attention = attention or self.backend.run
        step = _SlotStep(self._views, self._writes, rows, self.backend, attention)
        with attending(self.wrap(step)):
            output = self.loaded.model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=last,
            )
        return kept(output.logits[0], last)


@dataclass(frozen=True, slots=True)
class _SlotStep:
    """Attention of one step: write the new keys and values in place, then attend."""

    views: Seq[KV]
    writes: Seq[tuple[Write, Write]]
    rows: torch.Tensor
    backend: AttentionBackend
    attention: Attention

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        query, key, value = new
        slots = self.views[layer_index]
        if self.backend.writes_kv:
            return self.backend.run(layer, query, slots, (key, value))
        for write, tensor in zip(self.writes[layer_index], (key, value), strict=True):
            write(self.rows, tensor)
        return self.attention(layer, query, slots)


def kept(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The wanted logits `[N, V]`, whether the model kept all `[T, V]` or only those."""
    return logits if len(logits) == len(wanted) else logits[wanted]


def _last_places(segments: Seq[Segment], others: int) -> list[int]:
    """The slot of each token that the segments yield; `others` if it may not be the last one."""
    places: list[int] = []
    for segment in segments:
        if segment.sampled:
            count = segment.num_drafts
            places += [others] * (count + 1) if count else [segment.slot]
    return places


def _of_tokens(numbers: Iterable[Seq[float]]) -> tuple[Any, ...]:
    """`Candidates` or `Likeliest` from the float64 numbers that the device sends."""
    return tuple((int(token), *logprobs) for token, *logprobs in numbers)
