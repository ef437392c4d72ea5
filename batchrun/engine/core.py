"""The engine's nouns: what a request is, what a step does, and what it produces. No torch here."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, Protocol

from batchrun.engine.scores import Scores, Scoring, ScoringPass
from batchrun.errors import UserError

Likeliest = tuple[tuple[int, float], ...]  # tokens and their log-probabilities
TokenLogprobs = tuple[float, Likeliest]  # a token's own, and the likeliest at its position
Candidates = tuple[tuple[int, float, float], ...]
"""What may follow a beam: tokens, their log-probabilities, and those under the raw logits."""


class EngineError(UserError):
    """The engine can't continue."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one completion are chosen. `temperature == 0` is greedy.

    Args:
        max_tokens: Generated tokens at most; the context length may allow fewer. 0 only if known
            tokens are scored.
        min_tokens: No stop token is sampled and no stop string ends the text before this many.
        temperature: Logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches this.
        min_p: Drop tokens less likely than this share of the most likely one.
        repetition_penalty: Divides the logits of tokens seen in the prompt or the output;
            multiplies them if negative (Keskar et al. 2019, section 4.1).
        presence_penalty: Subtracted once from logits of tokens seen in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        seed: The row's own seed; None for the job's seed.
        stop: Texts that end the completion; they are not part of it.
        stop_token_ids: Tokens that end it, in addition to the model's own end tokens.
        ignore_eos: The model's own end tokens are never chosen, unless in `stop_token_ids`.
        scored: Sum the log-probabilities of the output tokens.
        logprobs: Keep the log-probability of each token, and those of this many likeliest tokens at
            its position; None for neither.
        constraint: What the answer must match: a grammar as llguidance reads it, in JSON or Lark's
            notation, or a JSON array of choices. None for anything.
        num_beams: Beam search with this many beams, instead of sampling; 1 for sampling.
        length_penalty: An answer's log-probability is divided by its length to this power.
        early_stopping: True ends the search at `num_beams` answers; False when a better one is
            unlikely; "never" when none is possible, given a length penalty of 0 or more.
        scoring: The request also scores known tokens: see `Request.scoring`.

    Attributes:
        penalised: Whether any penalty on tokens already seen is on.

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
    constraint: str | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    scoring: bool = False
    penalised: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        repetition, finite = self.repetition_penalty, "a finite number"
        least = "0 or more" if self.scoring else "at least 1 (0 only where known text is scored)"
        for name, valid, rule in (
            ("max_tokens", self.max_tokens >= (not self.scoring), least),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("temperature", 0 <= self.temperature < 1e6, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 1e-6 < repetition < 1e6, "above 0 (0.000001 to 1000000)"),
            ("presence_penalty", abs(self.presence_penalty) < 1e6, finite),
            ("frequency_penalty", abs(self.frequency_penalty) < 1e6, finite),
            ("min_tokens", self.min_tokens <= self.max_tokens, "at most max_tokens"),
            ("logprobs", (self.logprobs or 0) >= 0, "0 or more"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("num_beams", not (self.scoring and self.beams), "1 where known text is scored"),
            ("length_penalty", abs(self.length_penalty) < 100, finite),
            (
                "early_stopping",
                self.early_stopping in (True, False, "never"),
                "true, false or never",
            ),
            ("temperature", self.greedy or not self.beams, "0 with beam search"),
            ("stop", not (self.stop and self.beams), "left out with beam search"),
            ("stop", all(self.stop), "non-empty text"),
            ("constraint", not (self.constraint and self.beams), "left out with beam search"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")
        penalties = (repetition, self.presence_penalty, self.frequency_penalty)
        object.__setattr__(self, "penalised", penalties != (1, 0, 0))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    def stop_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end the completion, given the model's end tokens."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | eos_ids

    @property
    def wants_logprobs(self) -> bool:
        """Whether the output tokens' log-probabilities are asked for."""
        return self.scored or self.logprobs is not None

    @property
    def beams(self) -> bool:
        """Whether tokens are chosen by beam search."""
        return self.num_beams > 1


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to compute.

    Its random stream derives from (seed, row, sample, position) and nothing else. `generated_ids`
    are the tokens that an earlier run already computed, after which it continues;
    `generated_logprob` is the sum of their log-probabilities, `generated_logprobs` are the single
    ones. `scoring` asks for log-probabilities of known tokens, which are computed before anything
    is generated; the completion continues the prompt all the same. `context` names whatever else
    the numbers depend on: two requests share memory, answers or draft tokens only if their contexts
    are equal.
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
    scoring: Scoring | None = None

    @property
    def namespace(self) -> bytes:
        """A block that precedes the prompt's tokens wherever rows are identified by tokens."""
        return _digest(self.context) if self.context else b""


@lru_cache(1024)
def _digest(context: tuple[str, ...]) -> bytes:
    return blake2b(repr(context).encode("utf-8", "surrogatepass")).digest()


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    SCORED = "scored"  # nothing was to be generated
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request.

    Args:
        request: The request.
        token_ids: The output; after an error, what there was of it.
        text: The output's text; None after an error, without a tokenizer, or if there is no output.
        finish_reason: Why it ended.
        error_kind: The kind of failure; None if there was none.
        error: What went wrong; None if nothing did.
        logprob: Sum of the output's log-probabilities, if the parameters ask for it.
        logprobs: Log-probabilities of each output token, if the parameters ask for them.
        scores: Those of known tokens, if the request asks for them.
        arrived, admitted, first_token, finished: When it was queued, was first computed, got its
            first token, and ended, in `time.perf_counter` seconds; None for what never happened.
    """

    request: Request
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    finish_reason: FinishReason = FinishReason.STOP
    error_kind: str | None = None
    error: str | None = None
    logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    scores: Scores | None = None
    arrived: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


_TOLD: tuple[str, ...] = ("text", "finish_reason", "error_kind", "error", "logprob", "scores")
_TOLD += ("arrived", "admitted", "first_token", "finished")


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress. Invariant: `0 <= num_computed_tokens <= num_tokens`.

    `num_computed_tokens` counts the leading tokens whose keys and values are in the slot once the
    launched steps have run. `num_pending` tokens were sampled by steps that are not collected yet,
    so only the device knows them; one such step computes `num_drafts` draft tokens too. The next
    `num_ignored` tokens that are collected were known before. `logprob` is the sum of the output's
    log-probabilities if the parameters ask for it. `text` is the output's text once the sequence
    has ended without an error. Times are `time.perf_counter`
    seconds.

    `key` and `inherited` are those of its segments while it is in a slot.

    A sequence with a `scoring` pass generates nothing: it computes the pass's tokens, and has ended
    when their scores are known. `scores` are those of its row, of a sequence that comes after.
    """

    request: Request
    output_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending: int = 0
    num_drafts: int = 0
    num_ignored: int = 0
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
    blocks: tuple[int, ...] = ()  # of its tokens when last queued: see `prefixes.blocks_of`
    group: Group | None = None  # the group that it belongs to
    idle: bool = False  # waiting for the others of its group
    shares: bool = True  # memory with rows that have the same prefix
    scoring: ScoringPass | None = None
    scores: Scores | None = None
    prompt_ids: tuple[int, ...] = field(init=False)  # all tokens that it begins with
    num_prompt_tokens: int = field(init=False)
    most_tokens: int = field(init=False)  # of prompt and output, by its parameters

    def __post_init__(self) -> None:
        scoring, request = self.scoring, self.request
        self.prompt_ids = request.prompt_ids if scoring is None else scoring.token_ids
        self.num_prompt_tokens = len(self.prompt_ids)
        most = request.params.max_tokens if scoring is None else 1
        self.most_tokens = self.num_prompt_tokens + most

    @property
    def width(self) -> int:
        """Places in the batch that its row may need."""
        return 1 if self.group is None else self.group.width

    @property
    def known_ids(self) -> tuple[int, ...]:
        """Prompt and collected output."""
        return (*self.prompt_ids, *self.output_ids)

    @property
    def num_known_tokens(self) -> int:
        """Number of prompt tokens and collected output tokens."""
        return self.num_prompt_tokens + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens, pending ones included."""
        return self.num_prompt_tokens + len(self.output_ids) + self.num_pending

    @property
    def most_shared(self) -> int:
        """Leading tokens that it may take from another: those before the first wanted logits."""
        return self.num_tokens - 1 if self.scoring is None else self.scoring.begin

    def token_ids(self, start: int, length: int) -> list[int]:
        """Tokens `[start, start + length)` of the prompt followed by the collected output."""
        prompt = self.prompt_ids
        if start >= len(prompt):
            start -= len(prompt)
            return self.output_ids[start : start + length]
        ids = list(prompt[start : start + length])
        return ids + self.output_ids[: length - len(ids)]

    def fail(self, kind: str, reason: str) -> None:
        """End it with an error."""
        self.finish_reason, self.error_kind, self.error = FinishReason.ERROR, kind, reason

    def completion(self) -> Completion:
        """The completion of an ended sequence."""
        assert self.finish_reason is not None
        told: dict[str, Any] = {name: getattr(self, name) for name in _TOLD}
        token_ids, logprobs = tuple(self.output_ids), tuple(self.logprobs)
        return Completion(self.request, token_ids, logprobs=logprobs, **told)


class Group(Protocol):
    """Sequences of one row that advance together, in rounds: what becomes of one depends on all.

    Attributes:
        leader: The sequence that the row began with; it receives the row's answer.
        sequences: The live sequences.
        ended: Whether the answer is final.
    """

    leader: Sequence
    sequences: list[Sequence]
    ended: bool

    @property
    def width(self) -> int:
        """Maximum number of sequences it may have."""

    @property
    def is_complete(self) -> bool:
        """Whether all sequences have reported, so that `advance` is due."""

    def report(self, sequence: Sequence, candidates: Candidates, likeliest: Likeliest = ()) -> None:
        """Take in what may follow a sequence, which is then idle until the next round.

        `likeliest` holds as many tokens as the row's `logprobs` asks for.
        """

    def advance(self) -> list[tuple[Sequence, Sequence]]:
        """End the round.

        Changes the sequences' output; if a sequence is taken over, what was computed for it is
        void.

        Returns:
            The sequences that are taken over or new, each with the one whose tokens, except the
            last, it now has. Empty when the group has ended.
        """

    def finish(self) -> FinishReason:
        """Give the leader the answer; returns why that answer ended."""


@dataclass(slots=True, eq=False)  # not frozen: creating it would take four times as long
class Segment:
    """Tokens `[start, start + length)` of the sequence in a slot, computed in one step.

    `token_ids` are the tokens; empty for a single token that only the device knows yet. `sampled`
    means that the segment reaches the sequence's last token, so that its last logits yield the next
    one. The last `num_drafts` tokens of a sampled segment are draft tokens; each of them yields a
    token, and so does the token before them.

    `targets` are known tokens whose log-probabilities are wanted, in the place after each of the
    segment's last `len(targets)` tokens. Such a segment is not sampled.

    `key` identifies the sequence's stay in the slot. `inherited` says whose tokens it begins with:
    pairs of an end and the key of the stay that computed the tokens up to that end. It never
    changes.
    """

    slot: int
    start: int
    length: int
    sampled: bool
    token_ids: Seq[int] = ()
    num_drafts: int = 0
    key: int = -1
    inherited: tuple[tuple[int, int], ...] = ()
    targets: Seq[Seq[int]] = ()

    @property
    def end(self) -> int:
        """Number of the sequence's tokens up to the segment's last one."""
        return self.start + self.length

    @property
    def drafts(self) -> Seq[int]:
        """Its draft tokens."""
        return self.token_ids[self.length - self.num_drafts :] if self.num_drafts else ()
