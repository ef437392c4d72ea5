"""Turns logits into tokens, reproducibly for each row whatever else is in the batch."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from hashlib import blake2b

import numpy as np
import torch

from batchrun.engine import sums
from batchrun.engine.attention import Upload
from batchrun.engine.beams import width
from batchrun.engine.core import SamplingParams, Segment
from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.logits import LogitsConfig, processors
from batchrun.engine.plan import Masks, NewSequence
from batchrun.engine.processors import LogitsProcessor, LogitsRow

_CPU_SCORES, _GPU_SCORES = 48 << 20, 256 << 20  # bytes that scoring takes beside the logits
_COLDEST = 1e-37  # the lowest temperature that float32 can divide by


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends only on its arguments.

    A counter-based stream (Salmon et al., SC 2011, with BLAKE2 instead of Philox): batching, order,
    preemption and crashes can't shift it.
    """
    key = struct.pack("<qqqq", seed, row, sample, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


class Sampler:
    """Chooses next tokens on the logits' device, without ever waiting for it.

    Each row follows its own parameters, in transformers' order: its processors, then temperature,
    top-k, top-p, min-p, with the filters of the model's config in between.

    Args:
        num_slots: Slots that sequences can be in.
        upload: Copies an array to the device without waiting.
        eos_ids: The model's end tokens.
        config: What the model's generation config asks of logits.

    Attributes:
        processors: What changes logits before a token is chosen, in order.
    """

    def __init__(
        self,
        num_slots: int,
        upload: Upload,
        eos_ids: Collection[int] = (),
        config: LogitsConfig | None = None,
    ) -> None:
        self._config = config or LogitsConfig()
        self._eos_ids = frozenset(eos_ids)
        self.processors = processors(self._config, self._eos_ids, upload, num_slots)
        self._upload = upload
        self._rows: dict[int, LogitsRow] = {}  # slot -> what is known of the sequence in it
        self._active: list[LogitsProcessor] = []
        # The rows, which of them are drawn, and which are beams; then what they ask for: candidates
        # per beam, whether tokens are scored, and how many likeliest tokens per position.
        self._last: list[LogitsRow] = []
        self._drawn: list[int] = []
        self._beams: list[int] = []
        self._width, self._scored, self._likeliest = 0, False, 0

    def enter(self, new: Iterable[NewSequence]) -> None:
        """Take note of the sequences that entered slots."""
        for each in new:
            request, ids = each.request, list(each.output_ids)
            prompt = len(request.prompt_ids)
            self._rows[each.slot] = LogitsRow(each.slot, request, ids, request.params, prompt)

    def prepare(self, segments: Iterable[Segment]) -> list[LogitsRow]:
        """Do the host's part of a step while its logits are computed.

        Returns:
            A row for each token that the segments yield; valid until the next call.
        """
        found: list[LogitsRow] = []
        for segment in segments:
            if segment.sampled:
                row, ids = self._rows[segment.slot], segment.token_ids
                if row.num_drafts:
                    self._take_back(row, segment)
                at = segment.start - row.num_prompt_tokens
                if at >= 0 and ids:
                    row.output_ids[at:] = ids
                elif ids:
                    row.output_ids[:] = ids[-at:]
                end, count = segment.start + segment.length, segment.num_drafts
                for i in range(count):
                    found.append(replace(row, end=end - count + i, num_drafts=i))
                row.end, row.num_drafts = end, count
                found.append(row)
        if found != self._last:  # usually the same rows, one token on
            each = [row.params for row in found]
            self._drawn = [i for i, p in enumerate(each) if not p.greedy]
            self._beams = [i for i, p in enumerate(each) if p.beams]
            searches = (each[i] for i in self._beams)
            widths = (width(p.num_beams, len(p.stop_ids(self._eos_ids))) for p in searches)
            self._width = max(widths, default=0)
            self._scored = any(p.beams or p.wants_logprobs for p in each)
            self._likeliest = max((p.logprobs or 0 for p in each), default=0)
            self._last = found
        self._active = [p for p in self.processors if found and p.prepare(found)]
        return found

    def _take_back(self, row: LogitsRow, segment: Segment) -> None:
        """Roll back the tokens that were chosen after rejected draft tokens."""
        wrong = row.end + 1 - (segment.start + segment.length - segment.num_drafts)
        for processor in self.processors if wrong else ():
            processor.rollback(row, wrong)

    def sample(
        self, logits: torch.Tensor, rows: Seq[LogitsRow], masks: Masks | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Choose the token that follows each row; call `accept` once the tokens are final.

        Args:
            logits: `[N, V]`; may be changed in place.
            rows: The N rows, as prepared; a draw is tied to the position that it fills.
            masks: The tokens that constrained rows allow; they win over whatever bans tokens.

        Returns:
            `[N]` int64 token ids on the device of `logits`, -1 if no logit is finite, or one is NaN
            or infinite. If any row asks for them, also `[N]` float32, the tokens' log-probabilities
            under the original `logits`. Then, if M rows are beams, `[M, K, 3]` float64: K
            `Candidates` each; and if any row asks for the L likeliest, `[N, L, 2]` float64:
            `Likeliest`.
        """
        drawn, beams, scored = self._drawn, self._beams, self._scored
        if beams or (not _on_cpu(logits) and (drawn or scored)):
            logits = logits.float()
        changes = scored and (beams or self._active or masks is not None)
        own = logits.to(torch.float32, copy=True) if changes else logits
        if beams:  # their processors come after the softmax, as in transformers
            at = self._upload(np.array(beams))
            logits[at] = sums.log_softmax(logits[at])
        for processor in self._active:
            logits = processor.apply(logits, rows)
        if masks is not None and len(masks.rows):
            logits = self._masked(logits, masks)
        if drawn and len(drawn) == len(rows):
            tokens = self._draw(logits, rows)
        else:
            tokens = _most_likely(logits)
            if drawn:
                index = self._upload(np.array(drawn))
                tokens[index] = self._draw(logits[index], [rows[i] for i in drawn])
            self._mend(logits, tokens, masks)
        chosen: tuple[torch.Tensor, ...] = (tokens,)
        if scored:
            norm = _logsumexp(own)
            chosen += (own.gather(1, tokens.clamp_min(0)[:, None])[:, 0] - norm,)
        if beams:
            values, ids = _highest(logits[at], min(self._width, logits.shape[1]))
            chosen += (_joined(ids, values, own[at].gather(1, ids).float() - norm[at, None]),)
        if self._likeliest:
            values, ids = _highest(own, min(self._likeliest, own.shape[1]))
            chosen += (_joined(ids, values.float() - norm[:, None]),)
        return chosen

    def accept(self, tokens: torch.Tensor, rows: Seq[LogitsRow]) -> None:
        """Make the tokens `[N]` final.

        Separate from `sample`, so that a step that fails there can be retried.
        """
        for processor in self.processors:
            processor.accept(tokens, rows)

    def _masked(self, logits: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Set what masks leave out to minus infinity. Where all that is left is banned, it is 0."""
        if _on_cpu(logits) and cpu_sampling.mask(logits, masks.rows, masks.bits):
            return logits
        at = self._upload(masks.rows)
        allowed = _bits(self._upload(masks.bits.view(np.int32)), logits.shape[1])
        kept = logits[at].masked_fill(~allowed, -torch.inf)
        banned = kept.amax(1, keepdim=True) == -torch.inf
        logits[at] = kept.masked_fill(banned & allowed, 0.0)
        return logits

    def _mend(self, logits: torch.Tensor, tokens: torch.Tensor, masks: Masks | None) -> None:
        """Choose again where constraints refuse the most likely tokens: see `Masks.refused`."""
        refused = None if masks is None else masks.refused
        while refused is not None and (more := refused(tokens.tolist())) is not None:
            at = self._upload(more.rows)
            tokens[at] = _most_likely(self._masked(logits, more)[at])

    def _draw(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """Draw from `[N, V]` by inverting each row's distribution at its own uniform number."""
        params = [row.params for row in rows]
        numbers = [
            uniform(r.seed, r.row, r.sample, row.end) for row in rows for r in (row.request,)
        ]
        if not _on_cpu(logits):
            return self._draw_at_once(logits, params, numbers)
        if self._config.filters:
            logits = self._filtered(logits, params, self._columns(params, logits.shape[1]))
            params = [cpu_sampling.AS_IT_IS] * len(params)
        return cpu_sampling.draw(logits, params, numbers)

    def _draw_at_once(
        self, logits: torch.Tensor, params: Seq[SamplingParams], numbers: Seq[float]
    ) -> torch.Tensor:
        """As `_draw`, on a device, without waiting for it."""
        columns = self._columns(params, logits.shape[1], numbers)
        logits = self._filtered(logits, params, columns)
        cdf = sums.weights(logits).cumsum(dim=-1)
        total = cdf[:, -1:]
        # Strictly below the end, so that rounding never picks a token of probability zero.
        target = torch.minimum((columns[4] * total).long(), total - 1)
        tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
        return _if_finite(logits.amax(dim=-1), tokens)

    def _filtered(
        self, logits: torch.Tensor, params: Seq[SamplingParams], columns: torch.Tensor
    ) -> torch.Tensor:
        """Logits over their temperature, without the tokens that any filter rules out."""
        temperature, top_p, min_p, top_k = columns[:4]
        logits = self._config.filter_first(_over(logits.float(), temperature))
        logits = filter_rows(logits, params, top_p, min_p, top_k.long())
        return self._config.filter_last(logits)

    def _columns(
        self, params: Seq[SamplingParams], vocabulary: int, *others: Seq[float]
    ) -> torch.Tensor:
        """Each row's temperature, top-p, min-p and top-k, then `others`: `[4 or more, N, 1]`."""
        rows = [(p.temperature, p.top_p, p.min_p, p.top_k or vocabulary) for p in params]
        columns = [*zip(*rows, strict=True), *others]
        return self._upload(np.array(columns, dtype=np.float64))[:, :, None]


def score(logits: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of known tokens in the model's own distribution.

    Args:
        logits: `[N, V]`.
        places: `[P]` int64, a row of the logits for each token.
        tokens: `[P]` int64.

    Returns:
        `[P]` float32; NaN if no logit of the row is finite, or one is NaN or infinite.
    """
    # A sum over the vocabulary takes up to 24 bytes a logit.
    most = (_CPU_SCORES if _on_cpu(logits) else _GPU_SCORES) // (24 * logits.shape[1])
    norms = []
    for part in logits.split(max(1, most)):
        norm = _logsumexp(part if _on_cpu(part) else part.float())
        norms.append(torch.where(part.amax(dim=-1).isfinite(), norm, torch.nan))
    return logits[places, tokens].float() - torch.cat(norms)[places]


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """`[N, V]`, on a GPU of float32, to `[N]` float32."""
    return cpu_sampling.logsumexp(logits) if _on_cpu(logits) else sums.logsumexp(logits)


def _highest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logits of each row and their tokens, `[N, count]`; of equal ones the first.

    Which of equal ones `topk` takes depends on the count, which is the most that any row asks for,
    and on a GPU on the number of rows.
    """
    if _on_cpu(logits):
        values, ids = logits.topk(min(count + 1, logits.shape[1]))
        tied = (values[:, 1:] == values[:, :-1]).any(1)
        ids = ids[:, :count]
        if tied.any():
            ids[tied] = _first_highest(logits[tied], values[tied, count - 1 : count], count)
    else:
        bits = logits.float().view(torch.int32)
        order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in this order
        places = torch.arange(logits.shape[1], device=logits.device)
        ids = ((order << 32) - places).topk(count).indices
    return logits.gather(1, ids), ids


def _first_highest(logits: torch.Tensor, least: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens of `_highest`, `[N, count]`, of which the last has the logit `least` `[N, 1]`."""
    at, tokens = (~(logits < least)).nonzero(as_tuple=True)  # NaN is the highest
    order = logits[at, tokens].sort(descending=True, stable=True).indices
    order = order[at[order].sort(stable=True).indices]
    begins = torch.searchsorted(at, torch.arange(len(logits)))
    return tokens[order[begins[:, None] + torch.arange(count)]]


def _bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` bits of each row of int32 `[M, words]`, as bool `[M, count]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.view(torch.uint8)[:, :, None] >> shifts & 1).flatten(1)[:, :count].bool()
    return torch.nn.functional.pad(bits, (0, count - bits.shape[1]))


def _joined(*tensors: torch.Tensor) -> torch.Tensor:
    """Stack tokens and numbers, `[N, K]` each, as float64 `[N, K, 2 or more]`."""
    return torch.stack([tensor.double() for tensor in tensors], dim=-1)


def _over(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """`[N, V]` over `[N, 1]`, shifted so that each row's maximum is 0: float32 can't overflow."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature.float().clamp_min(_COLDEST)


def _if_finite(highest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `[N]`, or -1 where the highest logit is not finite: other logits may then be NaN."""
    return torch.where(highest.isfinite(), tokens, -1)


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The first token with the highest logit of each row; -1 if that is NaN or infinite."""
    if _on_cpu(logits):
        return cpu_sampling.most_likely(logits)
    tokens = logits.argmax(dim=-1)
    return _if_finite(logits.gather(1, tokens[:, None])[:, 0], tokens)


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def filter_rows(
    logits: torch.Tensor,
    params: Seq[SamplingParams],
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
) -> torch.Tensor:
    """Set what top-k, top-p or min-p rule out to minus infinity, for all rows `[N, V]` at once.

    Nothing here reads a value back from the device, so no step waits for it. `top_p`, `min_p` and
    `top_k` `[N, 1]` are the parameters on the device.
    """
    vocab = logits.shape[1]
    largest_k = min(max(p.top_k for p in params), vocab)
    if largest_k:
        head = logits.topk(largest_k).values
        limit = head.gather(1, top_k.clamp(max=largest_k) - 1)
        logits = logits.masked_fill((logits < limit) & (top_k < vocab), -torch.inf)
    if any(p.top_p < 1 for p in params):
        ordered = logits.sort(dim=-1, descending=True).values
        mass = sums.weights(ordered).cumsum(1)
        # The token that reaches top_p is the last one kept.
        last = (mass < top_p * mass[:, -1:]).sum(1, keepdim=True).clamp(max=vocab - 1)
        limit = ordered.gather(1, last)
        logits = logits.masked_fill((logits < limit) & (top_p < 1), -torch.inf)
    if any(p.min_p > 0 for p in params):
        limit = logits.amax(1, keepdim=True) + min_p.float().log()
        logits = logits.masked_fill(logits < limit, -torch.inf)
    return logits
