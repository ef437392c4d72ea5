"""The engine's nouns: what a request is, what a step does, what it produced. No torch here."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, Protocol

from batchrun.errors import UserError

Likeliest = tuple[tuple[int, float], ...]  # tokens and their log-probabilities
TokenLogprobs = tuple[float, Likeliest]  # of a token, and of the likeliest in its place
Candidates = tuple[tuple[int, float, float], ...]
"""What may follow a beam: tokens, their log-probabilities, and those of the model's own logits."""


class EngineError(UserError):
    """The engine can't go on."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one completion are chosen. `temperature == 0` is greedy.

    Args:
        max_tokens: Upper bound of generated tokens; the context length bounds it further.
        min_tokens: No stop token is sampled and no stop string ends the text before this many.
        temperature: Logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches this.
        min_p: Drop tokens less likely than this share of the most likely one.
        repetition_penalty: Divides (multiplies, if negative) logits of tokens seen in the prompt
            or the output (Keskar et al. 2019, section 4.1).
        presence_penalty: Subtracted once from logits of tokens seen in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        seed: The row's own seed; the job's where None.
        stop: Texts that end the completion; they are not part of it.
        stop_token_ids: Tokens that end it, beside the model's own end tokens.
        ignore_eos: The model's own end tokens never come, but for those in `stop_token_ids`.
        scored: The log-probabilities of its tokens are summed up.
        logprobs: The log-probability of each token is kept, and those of so many of the likeliest
            in its place; None for neither.
        num_beams: The likeliest answer is searched among so many at once, instead of sampling.
        length_penalty: An answer's log-probability is divided by its length to the power of it.
        early_stopping: Search ends when there are `num_beams` answers; if not, when none to come
            is likely to be better; "never", when none can be, for a length penalty of 0 or more.

    Attributes:
        penalised: Whether tokens already seen change the logits.

    Raises:
        ValueError: A value is out of range; the message names it.
    """

    max_tokens: int = 512
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    scored: bool = False
    logprobs: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    penalised: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        repetition, finite = self.repetition_penalty, "a finite number"
        for name, valid, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < 1e6, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 1e-6 < repetition < 1e6, "above 0 (0.000001 to 1000000)"),
            ("presence_penalty", abs(self.presence_penalty) < 1e6, finite),
            ("frequency_penalty", abs(self.frequency_penalty) < 1e6, finite),
            ("min_tokens", self.min_tokens <= self.max_tokens, "max_tokens at most"),
            ("logprobs", (self.logprobs or 0) >= 0, "0 or more"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("length_penalty", abs(self.length_penalty) < 100, finite),
            ("early_stopping", self.early_stopping in (True, False, "never"), "a flag, or never"),
            ("temperature", self.greedy or not self.beams, "0 with beam search"),
            ("stop", not (self.stop and self.beams), "left out with beam search"),
            ("stop", all(self.stop), "text that is not empty"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")
        penalties = (repetition, self.presence_penalty, self.frequency_penalty)
        object.__setattr__(self, "penalised", penalties != (1, 0, 0))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without a draw."""
        return self.temperature == 0

    def stop_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end the completion, of a model with these end tokens."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | eos_ids

    @property
    def beams(self) -> bool:
        """Whether tokens are chosen by beam search."""
        return self.num_beams > 1


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to compute.

    Its random stream derives from (seed, row, sample, position) and from nothing else.
    `generated_ids` are tokens of it that an earlier run computed, `generated_logprob` the sum of
    their log-probabilities, `generated_logprobs` each of them: it goes on behind them. Only where
    `context` is the same do two requests share memory, answers or draft tokens: it names what else
    the numbers depend on.
    """

    row: int
    sample: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    generated_ids: tuple[int, ...] = ()
    generated_logprob: float = 0.0
    generated_logprobs: tuple[TokenLogprobs, ...] = ()
    context: tuple[str, ...] = ()

    @property
    def namespace(self) -> bytes:
        """What precedes the prompt's tokens, in one block, in all that knows rows by them."""
        return _digest(self.context) if self.context else b""


@lru_cache(1024)
def _digest(context: tuple[str, ...]) -> bytes:
    return blake2b(repr(context).encode("utf-8", "surrogatepass")).digest()


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that has ended.

    Args:
        request: It.
        token_ids: The output; where it ended in an error, as far as it came.
        text: The output's text; None where it ended in an error, or without a tokenizer.
        finish_reason: Why it ended.
        error_kind: The kind of the failure; None if it is none.
        error: What was wrong; None likewise.
        logprob: Sum of the output's log-probabilities, where the parameters ask for it.
        logprobs: Of each token of it, likewise.
        arrived, admitted, first_token, finished: When it was queued, first computed, had a token,
            and ended, in `time.perf_counter` seconds; None where it did not come to that.
    """

    request: Request
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    finish_reason: FinishReason = FinishReason.STOP
    error_kind: str | None = None
    error: str | None = None
    logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


_TOLD: tuple[str, ...] = ("text", "finish_reason", "error_kind", "error", "logprob")
_TOLD += ("arrived", "admitted", "first_token", "finished")


@dataclass(slots=True, eq=False)
class Sequence:
    """A request being worked on. Invariant: `0 <= num_computed_tokens <= num_tokens`.

    `num_computed_tokens` counts the leading tokens whose keys and values are in the slot once the
    launched steps have run. `num_pending` tokens were sampled by steps that are not collected yet:
    they exist, and only the device knows them. `logprob` is the sum of the output's
    log-probabilities where the parameters ask for it. `text` is the output's once it has
    ended without an error. Times are `time.perf_counter` seconds.

    `key` and `inherited` are those of its segments while it is in a slot.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending: int = 0
    slot: int | None = None
    text: str | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_kind: str | None = None
    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    high_water: int = 0
    inherited: tuple[tuple[int, int], ...] = ()
    key: int = -1
    blocks: tuple[int, ...] = ()  # of its tokens when it last began to wait: `prefixes.blocks_of`
    group: Group | None = None  # whose round it is part of
    idle: bool = False  # until the others of its group have computed theirs
    shares: bool = True  # memory with rows that begin alike
    num_prompt_tokens: int = field(init=False)
    most_tokens: int = field(init=False)  # prompt and output, as the parameters allow

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_ids)
        self.most_tokens = self.num_prompt_tokens + self.request.params.max_tokens

    @property
    def width(self) -> int:
        """Places in the batch that its row may need."""
        return 1 if self.group is None else self.group.width

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Prompt and collected output."""
        return (*self.request.prompt_ids, *self.output_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and collected output together, in tokens."""
        return self.num_prompt_tokens + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output together, in tokens, pending ones included."""
        return self.num_prompt_tokens + len(self.output_ids) + self.num_pending

    def token_ids(self, start: int, length: int) -> list[int]:
        """Tokens `[start, start + length)` of prompt followed by collected output."""
        prompt = self.request.prompt_ids
        if start >= len(prompt):
            start -= len(prompt)
            return self.output_ids[start : start + length]
        ids = list(prompt[start : start + length])
        return ids + self.output_ids[: length - len(ids)]

    def fail(self, kind: str, reason: str) -> None:
        """It ends as an error."""
        self.finish_reason, self.error_kind, self.error = FinishReason.ERROR, kind, reason

    def completion(self) -> Completion:
        """What it came to."""
        assert self.finish_reason is not None
        told: dict[str, Any] = {name: getattr(self, name) for name in _TOLD}
        token_ids, logprobs = tuple(self.output_ids), tuple(self.logprobs)
        return Completion(self.request, token_ids, logprobs=logprobs, **told)


class Group(Protocol):
    """Sequences of one row that go on together, in rounds: what becomes of one is up to all.

    Attributes:
        leader: The sequence that the row began with, which gets its answer.
        sequences: Those that live.
        ended: Whether the answer is final.
    """

    leader: Sequence
    sequences: list[Sequence]
    ended: bool

    @property
    def width(self) -> int:
        """Sequences that it may come to have."""

    @property
    def is_complete(self) -> bool:
        """Whether all sequences have reported: `advance` is due."""

    def report(self, sequence: Sequence, candidates: Candidates, likeliest: Likeliest = ()) -> None:
        """Take in what may follow a sequence, which is idle until the next round.

        `likeliest` are as many as its row's `logprobs` asks for.
        """

    def advance(self) -> list[tuple[Sequence, Sequence]]:
        """End the round.

        Changes the sequences' output; where one is taken over, what is computed for it is void.

        Returns:
            The sequences that are taken over or new, each with the one whose tokens, but for the
            last, are its own now. Empty when the group has ended.
        """

    def finish(self) -> FinishReason:
        """Give the leader the answer; returns why that one ended."""


@dataclass(slots=True, eq=False)  # not frozen: that is four times as slow to make
class Segment:
    """Tokens `[start, start + length)` of the sequence in a slot, computed in one step.

    `token_ids` are theirs; none where it is one token that the device alone knows yet. `sampled`
    says that the segment reaches the sequence's last token, so that its last logits yield the next
    one. The last `num_drafts` tokens of a sampled segment are draft tokens; each of them yields a
    token, and so does what they follow.

    `key` is the number of the sequence's stay in the slot. `inherited` says whose tokens it begins
    with: ends, and the keys of those who have computed the tokens before them, as they had them
    then. It is never changed.
    """

    slot: int
    start: int
    length: int
    sampled: bool
    token_ids: Seq[int] = ()
    num_drafts: int = 0
    key: int = -1
    inherited: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        """Tokens of the sequence up to its last one."""
        return self.start + self.length

    @property
    def drafts(self) -> Seq[int]:
        """Its draft tokens."""
        return self.token_ids[self.length - self.num_drafts :] if self.num_drafts else ()
