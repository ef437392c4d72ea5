"""Logits to tokens, reproducible for each row whatever else is in the batch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from batchrun.engine.beams import width
from batchrun.engine.core import NewSequence, SamplingParams, Segment
from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.processors import Processors, Row, ban

_AS_IT_IS = SamplingParams(temperature=1.0)  # draws from all logits
_COLDEST = 1e-37  # of temperatures that float32 can divide by


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone.

    A counter-based stream (Salmon et al., SC 2011, with BLAKE2 in the place of Philox): batching,
    order, preemption and a crash can't shift it.
    """
    key = struct.pack("<qqqq", seed, row, sample, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


class Sampler:
    """Chooses next tokens on the logits' device, and never waits for it.

    Each row is treated by its own parameters, in transformers' order: penalties, minimum length,
    temperature, top-k, top-p, min-p; where a model has `Processors`, these in between.

    Args:
        num_slots: Slots that sequences can be in.
        upload: Copies an array to the device without waiting.
        processors: What the model does to logits, beside what parameters say.
        eos_ids: The model's end tokens, which rows that ignore them never get.
    """

    def __init__(
        self,
        num_slots: int,
        upload: Callable[[np.ndarray], torch.Tensor],
        processors: Processors | None = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        self._eos_ids = frozenset(eos_ids)
        self._ends: torch.Tensor | None = None  # the same on the device
        self._num_slots = num_slots
        self._upload = upload
        self._processors = processors if processors and processors.active else None
        self._seen: _Seen | None = None
        self._rows: dict[int, Row] = {}  # slot -> what is known of the sequence in it

    def enter(self, new: Iterable[NewSequence]) -> None:
        """Take note of the sequences that have come to slots."""
        for each in new:
            self._rows[each.slot] = Row.of(each)

    def rows(self, segments: Iterable[Segment]) -> list[Row]:
        """A row for each token that segments yield; they hold until the next call."""
        found: list[Row] = []
        for segment in segments:
            if segment.sampled:
                row, ids = self._rows[segment.slot], segment.token_ids
                end = segment.start + segment.length
                at = segment.start - row.num_prompt_tokens
                if at >= 0 and ids:
                    row.output_ids[at:] = ids
                elif ids:
                    row.output_ids[:] = ids[-at:]
                for before in range(segment.num_drafts, 0, -1):
                    found.append(replace(row, end=end - before))
                row.end = end
                found.append(row)
        return found

    def sample(self, logits: torch.Tensor, rows: Seq[Row]) -> tuple[torch.Tensor, ...]:
        """Choose the token that follows each segment; `took` is to be told once they stand.

        Args:
            logits: `[N, V]`; may be changed in place.
            rows: Of the N rows; a draw belongs to the position that it fills.

        Returns:
            `[N]` int64 token ids on the device of `logits`, -1 where no logit is finite, or one is
            NaN or infinite; and, where any row asks for them,
            `[N]` float32, the tokens' log-probabilities under `logits` as they came. Where M
            rows are of beams, both, and `[M, K, 2]` float64: the ids and log-probabilities of K
            candidates each.
        """
        params, asked = [row.params for row in rows], self._processors
        plain = asked is None and all(p.plain for p in params)
        scored = not plain and any(p.logprobs or p.beams for p in params)
        own = self._ban_ends(logits, params, keep=scored)
        if plain:
            return (_most_likely(logits),)
        beams = [i for i, p in enumerate(params) if p.beams]
        penalised = [i for i, p in enumerate(params) if p.penalised]
        banned = list(self._banned(rows, logits.shape[1]))
        changed = bool(asked or penalised or banned)
        if not (scored or changed) and all(p.greedy for p in params):
            return (_most_likely(logits),)
        if beams or changed or not _on_cpu(logits):
            logits = logits.float()
        if own is None:
            own = logits.clone() if scored and changed else logits
        if beams:  # whose processors come after the softmax, in transformers too
            at = self._upload(np.array(beams))
            logits[at] = logits[at].log_softmax(dim=-1)
        if changed:
            logits = self._process(logits, rows, penalised, banned)
        if asked and asked.renormalize and beams:
            logits[at] = logits[at].log_softmax(dim=-1)
        drawn = [i for i, p in enumerate(params) if not p.greedy]
        if len(drawn) == len(rows):
            tokens = self._draw(logits, rows)
        else:
            tokens = _most_likely(logits)
            if drawn:
                index = self._upload(np.array(drawn))
                tokens[index] = self._draw(logits[index], [rows[i] for i in drawn])
        chosen: tuple[torch.Tensor, ...] = (tokens,)
        if scored:
            norm = cpu_sampling.logsumexp(own) if _on_cpu(own) else own.logsumexp(dim=-1)
            chosen += (own.gather(1, tokens.clamp_min(0)[:, None])[:, 0] - norm,)
        if beams:
            chosen += (self._candidates(logits[at], [rows[i] for i in beams]),)
        return chosen

    def _process(
        self,
        logits: torch.Tensor,
        rows: Seq[Row],
        penalised: Seq[int],
        banned: Seq[tuple[int, int]],
    ) -> torch.Tensor:
        """Apply all that changes logits `[N, V]` before a token is chosen, mostly in place."""
        asked = self._processors
        if asked is not None:
            asked.add_bias(logits, rows, self._upload)
        if penalised:
            if self._seen is None:
                self._seen = _Seen(self._num_slots, logits, self._upload)
            at = self._upload(np.array(penalised))
            self._seen.penalise(logits, at, [rows[i] for i in penalised])
        ban(logits, banned, self._upload)
        return logits if asked is None else asked.finish(logits, rows, self._upload)

    def _ban_ends(
        self, logits: torch.Tensor, params: Seq[SamplingParams], *, keep: bool
    ) -> torch.Tensor | None:
        """Set the end tokens of rows that ignore them to minus infinity, in place.

        Not of beams, whose log-probabilities come first, nor those that a row stops at itself.

        Returns:
            With `keep`, and if logits are changed, a float32 copy as they were.
        """
        if not self._eos_ids or not any(p.ignore_eos for p in params):
            return None
        own = logits.to(torch.float32, copy=True) if keep else None
        if all(p.ignore_eos and not (p.beams or p.stop_token_ids) for p in params):
            if self._ends is None:
                self._ends = torch.tensor(sorted(self._eos_ids), device=logits.device)
            logits.index_fill_(1, self._ends, -torch.inf)
        else:
            pairs = [
                (i, token)
                for i, p in enumerate(params)
                if not p.beams
                for token in self._ignored(p)
            ]
            ban(logits, pairs, self._upload)
        return own

    def _ignored(self, params: SamplingParams) -> list[int]:
        """The end tokens that a row never gets."""
        if not params.ignore_eos:
            return []
        return [token for token in self._eos_ids if token not in params.stop_token_ids]

    def _banned(self, rows: Seq[Row], vocabulary: int) -> Iterator[tuple[int, int]]:
        """What may not be sampled: the number of a row, and a token."""
        for i, row in enumerate(rows):
            params = row.params
            if params.beams:
                yield from ((i, token) for token in self._ignored(params))
            if params.min_tokens > row.num_generated:
                for token in params.stop_ids(self._eos_ids):
                    if token < vocabulary:  # a row may name any, and none beyond is ever drawn
                        yield i, token
            if self._processors is not None:
                yield from ((i, token) for token in self._processors.banned(row))

    def took(self, tokens: torch.Tensor, rows: Seq[Row]) -> None:
        """Count the tokens `[N]` that were chosen for penalties to come.

        Apart from `sample`, so that a step that fails there may be tried again.
        """
        if self._seen is None:
            return
        each = enumerate(row.params for row in rows)
        counted = [i for i, p in each if p.penalised and not p.beams]
        if counted:
            index = self._upload(np.array(counted))
            taken = tokens[index].clamp_min(0)
            self._seen.count(taken, [rows[i] for i in counted])

    def _candidates(self, logprobs: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """The likeliest tokens of `[M, V]`, and their log-probabilities: `[M, K, 2]` float64."""
        most = max(
            width(row.params.num_beams, len(row.params.stop_ids(self._eos_ids))) for row in rows
        )
        values, ids = logprobs.topk(min(most, logprobs.shape[1]))
        return torch.stack((ids.double(), values.double()), dim=-1)

    def _draw(self, logits: torch.Tensor, rows: Seq[Row]) -> torch.Tensor:
        """Draw from `[N, V]` by inverting each row's distribution at its own uniform number."""
        params = [row.params for row in rows]
        numbers = [
            uniform(r.seed, r.row, r.sample, row.end) for row in rows for r in (row.request,)
        ]
        if self._processors is not None and self._processors.filters:
            logits = self._filtered(logits, params, self._processors)
            params = [_AS_IT_IS] * len(params)
        if _on_cpu(logits):
            return cpu_sampling.draw(logits, params, numbers)
        return self._draw_at_once(logits, params, numbers)

    def _filtered(
        self, logits: torch.Tensor, params: Seq[SamplingParams], processors: Processors
    ) -> torch.Tensor:
        """Logits over their temperature, without what all filters together rule out."""
        columns = self._columns(params, logits.shape[1])
        logits = processors.filter_first(_over(logits.float(), columns[0]))
        logits = filter_rows(logits, params, columns[1], columns[2], columns[3].long())
        return processors.filter_last(logits)

    def _columns(
        self, params: Seq[SamplingParams], vocabulary: int, *others: Seq[float]
    ) -> torch.Tensor:
        """Temperature, top-p, min-p and top-k of each row, and more: `[4 or more, N, 1]`."""
        columns = [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.top_k or vocabulary for p in params],
            *others,
        ]
        return self._upload(np.array(columns, dtype=np.float64))[:, :, None]

    def _draw_at_once(
        self, logits: torch.Tensor, params: Seq[SamplingParams], numbers: Seq[float]
    ) -> torch.Tensor:
        """The same for a device that nobody waits for."""
        columns = self._columns(params, logits.shape[1], numbers)
        logits = _over(logits, columns[0])
        highest = logits.amax(dim=-1)
        logits = filter_rows(logits, params, columns[1], columns[2], columns[3].long())
        cdf = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        total = cdf[:, -1:]
        # Strictly below the end, so that rounding can never choose a token of probability zero.
        target = torch.minimum(columns[4] * total, torch.nextafter(total, torch.zeros_like(total)))
        return _if_finite(highest, torch.searchsorted(cdf, target, right=True)[:, 0])


def _over(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """`[N, V]` over `[N, 1]`, but for a number a row, so that no highest one is beyond float32."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature.float().clamp_min(_COLDEST)


def _if_finite(highest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `[N]`, -1 where the highest logit is no finite number: then others may be none."""
    return torch.where(highest.isfinite(), tokens, -1)


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The first of the highest of each row; -1 where that is NaN or infinite."""
    if _on_cpu(logits):
        return cpu_sampling.most_likely(logits)
    tokens = logits.argmax(dim=-1)
    return _if_finite(logits.gather(1, tokens[:, None])[:, 0], tokens)


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


class _Seen:
    """The tokens of each slot's sequence, on the device, because the last one is known there first.

    `counts` `[num_slots, V]` has how often each token is in the output, `prompt` `[num_slots, V]`
    whether it is in the prompt.
    """

    def __init__(
        self, num_slots: int, logits: torch.Tensor, upload: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        shape = (num_slots, logits.shape[1])
        self.counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
        self.prompt = torch.zeros(shape, dtype=torch.bool, device=logits.device)
        self._one = torch.ones((), dtype=torch.int32, device=logits.device)
        self._upload = upload
        self._holds: dict[int, tuple[Row, int]] = {}  # slot -> whose, how many output tokens

    def penalise(self, logits: torch.Tensor, at: torch.Tensor, rows: Seq[Row]) -> None:
        """Apply repetition, presence and frequency penalties to some rows of `[N, V]`, in place.

        Args:
            logits: Of all rows.
            at: `[M]`, those to penalise.
            rows: Those M.
        """
        for row in rows:
            if self._holds.get(row.slot) != (row, row.num_generated):
                self._rebuild(row)
        slots = self._slots(rows)
        params = [row.params for row in rows]
        penalties = self._upload(
            np.array(
                [
                    [p.repetition_penalty for p in params],
                    [p.presence_penalty for p in params],
                    [p.frequency_penalty for p in params],
                ],
                dtype=np.float32,
            )
        )
        if _on_cpu(logits) and cpu_sampling.penalise(
            logits, at, slots, penalties, counts=self.counts, prompt=self.prompt
        ):
            return
        repetition, presence, frequency = penalties[:, :, None]
        values, counts = logits[at], self.counts[slots]
        repeated = torch.where(values < 0, values * repetition, values / repetition)
        values = torch.where(self.prompt[slots] | (counts > 0), repeated, values)
        logits[at] = values - (presence * (counts > 0) + frequency * counts)

    def count(self, tokens: torch.Tensor, rows: Seq[Row]) -> None:
        """Add one token `[M]` to each row's sequence."""
        self.counts.index_put_((self._slots(rows), tokens), self._one, accumulate=True)
        for row in rows:
            self._holds[row.slot] = (row, row.num_generated + 1)

    def _slots(self, rows: Seq[Row]) -> torch.Tensor:
        return self._upload(np.array([row.slot for row in rows]))

    def _rebuild(self, row: Row) -> None:
        """Begin anew with a sequence that has come to the slot, all of whose tokens are known."""
        slot, output = row.slot, row.output_ids[: row.num_generated]
        self.counts[slot] = 0
        self.prompt[slot] = False
        self.prompt[slot, self._upload(np.array(row.request.prompt_ids))] = True
        if output:
            ids = self._upload(np.array(output))
            self.counts[slot].index_add_(0, ids, self._one.expand(len(output)))


def filter_rows(
    logits: torch.Tensor,
    params: Seq[SamplingParams],
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
) -> torch.Tensor:
    """Set what top-k, top-p and min-p rule out to minus infinity, all rows `[N, V]` at once.

    Nothing here depends on a value on the device, so that no step waits for it. `top_p`, `min_p`
    and `top_k` `[N, 1]` are the parameters there.
    """
    vocab = logits.shape[1]
    largest_k = min(max(p.top_k for p in params), vocab)
    if largest_k:
        head = logits.topk(largest_k).values
        limit = head.gather(1, top_k.clamp(max=largest_k) - 1)
        logits = logits.masked_fill((logits < limit) & (top_k < vocab), -torch.inf)
    if any(p.top_p < 1 for p in params):
        ordered = logits.sort(dim=-1, descending=True).values
        mass = (ordered.double() - ordered.double().logsumexp(1, keepdim=True)).exp().cumsum(1)
        # The token that reaches top_p is the last one kept.
        last = (mass < top_p).sum(1, keepdim=True).clamp(max=vocab - 1)
        limit = ordered.gather(1, last)
        logits = logits.masked_fill((logits < limit) & (top_p < 1), -torch.inf)
    if any(p.min_p > 0 for p in params):
        limit = logits.amax(1, keepdim=True) + min_p.float().log()
        logits = logits.masked_fill(logits < limit, -torch.inf)
    return logits
