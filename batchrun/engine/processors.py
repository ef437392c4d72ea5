"""What a model's generation config does to logits, as transformers' processors and warpers do it.

The order is transformers' own (`GenerationMixin._get_logits_processor`), with our parameters at
their places: biases, penalties, bans (with `min_tokens`), forced tokens, invalid values, the
growing weight of end tokens, suppressed tokens; of rows that are drawn then temperature, top-h,
top-k, top-p, min-p, typical-p, epsilon, eta. Those of beams act on log-probabilities.

What depends on a row's tokens is decided on the host, so those must be known when it is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch

from batchrun.engine.core import NewSequence, Request, SamplingParams

Upload = Callable[[np.ndarray], torch.Tensor]
Ids = tuple[int, ...]

_TOP_H = 100  # tokens that top-h looks at
_MOST_DECAY = 1e30  # times an end token's logit: beyond that is no float32


@dataclass(slots=True, eq=False)
class Row:
    """A row of logits: what the token that follows the first `end` ones of a sequence is chosen by.

    `output_ids` are the sequence's, as the host knows them: complete where no step is in flight.
    """

    slot: int
    request: Request
    output_ids: list[int]
    params: SamplingParams
    num_prompt_tokens: int
    end: int = 0

    @classmethod
    def of(cls, new: NewSequence) -> Row:
        """Of a sequence that has come to a slot."""
        request = new.request
        length = len(request.prompt_ids)
        return cls(new.slot, request, list(new.output_ids), request.params, length)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return self.end - self.num_prompt_tokens

    @property
    def most_tokens(self) -> int:
        """Prompt and output together, as the parameters allow."""
        return self.num_prompt_tokens + self.params.max_tokens

    def ids_so_far(self, last: int | None = None) -> list[int]:
        """The sequence's tokens up to `end`.

        Args:
            last: Only so many, `end` at most; None for all.
        """
        begin = (0 if last is None else self.end - last) - self.num_prompt_tokens
        output = self.output_ids[max(begin, 0) : self.num_generated]
        return output if begin >= 0 else [*self.request.prompt_ids[begin:], *output]


@dataclass(frozen=True)
class Processors:
    """What a generation config asks of logits, beside what sampling parameters say.

    Args:
        eos_ids: The model's end tokens.
        max_model_len: Tokens of prompt and output together at most.
        sequence_bias: Added to the logit of a sequence's last token where the others precede it.
        bad_words: Sequences whose last token may not follow the others.
        no_repeat_ngram_size: No sequence of so many tokens comes twice; 0 where that is allowed.
        forced_bos: The token that follows a prompt of one token.
        forced_eos: The tokens one of which is the last one where the length ends an answer.
        remove_invalid_values: NaN counts as 0, infinities as the largest numbers there are.
        decay: From so many tokens on, end tokens become likelier by a factor a token.
        suppress: Tokens that never come.
        begin_suppress: Tokens that do not come first.
        renormalize: Beams' log-probabilities are those of what is left.
        top_h, typical_p, epsilon, eta: Filters of drawn rows; None or 0 where off.
    """

    eos_ids: Ids = ()
    max_model_len: int = 1 << 62
    sequence_bias: Mapping[Ids, float] = field(default_factory=dict)
    bad_words: tuple[Ids, ...] = ()
    no_repeat_ngram_size: int = 0
    forced_bos: int | None = None
    forced_eos: Ids = ()
    remove_invalid_values: bool = False
    decay: tuple[int, float] | None = None
    suppress: Ids = ()
    begin_suppress: Ids = ()
    renormalize: bool = False
    top_h: float | None = None
    typical_p: float | None = None
    epsilon: float = 0.0
    eta: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return self != Processors(self.eos_ids, self.max_model_len)

    @property
    def filters(self) -> bool:
        """Whether drawn rows are filtered by more than their own parameters."""
        return any((self.top_h, self.typical_p, self.epsilon, self.eta))

    @property
    def reads_tokens(self) -> tuple[str, ...]:
        """What depends on the tokens of a row so far, by the config's names."""
        asked = {
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "bad_words_ids": any(len(word) > 1 for word in self.bad_words),
            "sequence_bias": any(len(ids) > 1 for ids in self.sequence_bias),
        }
        return tuple(name for name, depends in asked.items() if depends)

    def add_bias(self, logits: torch.Tensor, rows: Seq[Row], upload: Upload) -> None:
        """Add biases to `[N, V]`, in place."""
        found = [
            (i, ids[-1], bias)
            for i, row in enumerate(rows)
            for ids, bias in self.sequence_bias.items()
            if _ends_with(row, ids[:-1])
        ]
        if found:
            at = upload(np.array([f[:2] for f in found]).T)
            values = upload(np.array([f[2] for f in found], np.float32))
            logits.index_put_((at[0], at[1]), values, accumulate=True)

    def banned(self, row: Row) -> Iterator[int]:
        """Tokens that may not follow a row for those before it."""
        for word in self.bad_words:
            if _ends_with(row, word[:-1]):
                yield word[-1]
        size = self.no_repeat_ngram_size
        if size and row.end >= size:
            tokens = np.array(row.ids_so_far(), np.int64)
            windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
            same = (windows[:, :-1] == tokens[len(tokens) + 1 - size :]).all(1)
            yield from np.unique(windows[same, -1]).tolist()

    def finish(self, logits: torch.Tensor, rows: Seq[Row], upload: Upload) -> torch.Tensor:
        """What comes after penalties and bans, on `[N, V]`, mostly in place; returns it."""
        self._force(logits, rows, upload)
        if self.remove_invalid_values:
            logits = logits.nan_to_num(nan=0.0)
        self._decay(logits, rows, upload)
        begun = [i for i, row in enumerate(rows) if self._at_begin(row)]
        pairs = [(i, t) for i in range(len(rows)) for t in self.suppress]
        pairs += [(i, t) for i in begun for t in self.begin_suppress]
        ban(logits, pairs, upload)
        return logits

    def filter_first(self, logits: torch.Tensor) -> torch.Tensor:
        """Top-h, which comes before all filters of a row's own."""
        if self.top_h is None:
            return logits
        head, at = logits.topk(min(_TOP_H, logits.shape[1]), dim=-1)
        logprobs = head.log_softmax(-1)
        terms = -_times(logprobs.exp(), logprobs)
        keep = terms.cumsum(-1) <= terms.sum(-1, keepdim=True) * self.top_h
        keep[:, 0] = True
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, at, keep)
        return logits.masked_fill(~kept, -torch.inf)

    def filter_last(self, logits: torch.Tensor) -> torch.Tensor:
        """Typical-p (arXiv 2202.00666), epsilon and eta (arXiv 2210.15191)."""
        if self.typical_p is not None:
            logprobs = logits.log_softmax(-1)
            entropy = -_times(logprobs.exp(), logprobs).sum(-1, keepdim=True)
            shifted = (-logprobs - entropy).abs()
            ordered, at = shifted.sort(-1)
            mass = logits.gather(-1, at).softmax(-1).cumsum(-1)
            last = (mass < self.typical_p).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
            drop = ordered > ordered.gather(1, last)
            drop[:, 0] = False
            logits = logits.masked_fill(drop.scatter(1, at, drop), -torch.inf)
        if self.epsilon:
            logits = _drop_below(logits, torch.full_like(logits[:, :1], self.epsilon))
        if self.eta:
            logprobs = logits.log_softmax(-1)
            entropy = -_times(logprobs.exp(), logprobs).sum(-1, keepdim=True)
            logits = _drop_below(logits, ((-entropy).exp() * self.eta**0.5).clamp(max=self.eta))
        return logits

    def _force(self, logits: torch.Tensor, rows: Seq[Row], upload: Upload) -> None:
        pairs = []
        for i, row in enumerate(rows):
            if self.forced_bos is not None and row.end == 1:
                pairs.append((i, self.forced_bos))
            if row.end == min(row.most_tokens, self.max_model_len) - 1:
                pairs = [p for p in pairs if p[0] != i] if self.forced_eos else pairs
                pairs += [(i, token) for token in self.forced_eos]
        if pairs:
            at = upload(np.array(pairs).T)
            logits[at[0]] = -torch.inf
            logits[at[0], at[1]] = 0.0

    def _decay(self, logits: torch.Tensor, rows: Seq[Row], upload: Upload) -> None:
        if self.decay is None or not self.eos_ids:
            return
        start, factor = self.decay
        grown, weights = [], []
        for i, row in enumerate(rows):
            beyond = row.num_generated - start
            if beyond > 0:
                grown.append(i)
                weights.append(_power(factor, beyond) - 1)
        if grown:
            at = upload(np.array(grown))[:, None], upload(np.array(self.eos_ids))[None]
            values, weight = logits[at], upload(np.array(weights, np.float32))[:, None]
            logits[at] = values + torch.where(values.isfinite(), values.abs() * weight, 0.0)

    def _at_begin(self, row: Row) -> bool:
        prompt = row.num_prompt_tokens
        return row.end == prompt + (prompt == 1 and self.forced_bos is not None)


def ban(logits: torch.Tensor, pairs: Iterable[tuple[int, int]], upload: Upload) -> None:
    """Set some `(row, token)` of `[N, V]` to minus infinity, in place."""
    found = np.array(list(pairs), np.int64)
    if len(found):
        at = upload(np.ascontiguousarray(found.T))
        logits[at[0], at[1]] = -torch.inf


def _ends_with(row: Row, ids: Ids) -> bool:
    count = len(ids)
    return not count or (count <= row.end and row.ids_so_far(count) == list(ids))


def _power(factor: float, exponent: int) -> float:
    try:
        return min(factor**exponent, _MOST_DECAY)
    except OverflowError:
        return _MOST_DECAY


def _times(probabilities: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Their product, 0 where the probability is."""
    return torch.where(probabilities > 0, probabilities * logprobs, 0.0)


def _drop_below(logits: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Without tokens of a probability below `[N, 1]`, but for the likeliest."""
    drop = (logits.softmax(-1) < limit) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(drop, -torch.inf)
