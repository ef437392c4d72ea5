"""What goes to an executor and comes back: values that any process can use. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.allocator.sharing import MemoryCopy
from batchrun.engine.core import Candidates, Likeliest, Request, Segment

Targets = NDArray[np.int64] | None  # `[2, P]`


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that has entered a slot: its request, and its output so far."""

    slot: int
    request: Request
    output_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The segments of one step, single-token ones (decodes) first: a value for any process.

    `new` are the sequences that are in their slots for the first time: executors keep what they
    need of them, and later plans name only their slots. `copies` are made in KV memory, in order,
    before the segments are computed and after step `copies_after`, the last one that uses what they
    read and write. Later steps may still be running.
    """

    step: int
    segments: tuple[Segment, ...]
    new: tuple[NewSequence, ...] = ()
    copies: tuple[MemoryCopy, ...] = ()
    copies_after: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Which tokens constrained rows of a step allow; a bit each, the lowest first.

    Args:
        rows: `[M]` int64: places among the tokens that the step yields.
        bits: `[M, words]` uint32: token t is allowed if bit t % 32 of word t // 32 is set.
        refused: Told the most likely tokens, -1 where there is none, returns the masks that some of
            them still need, as most are allowed without; None once they need none. It is None where
            these masks are all, as for every executor that is not `on_host`.
    """

    rows: NDArray[np.int64]
    bits: NDArray[np.uint32]
    refused: Callable[[Seq[int]], Masks | None] | None = None


NO_MASKS = Masks(np.empty(0, np.int64), np.empty((0, 0), np.uint32))


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced: the token after each sampled segment, in the plan's order.

    A segment with draft tokens has several: one after its last known token, and one after each
    draft.

    A token below 0 means that the logits for it are not finite.

    `logprobs` are the tokens' log-probabilities under the model's own distribution, before
    penalties, temperature and filters; empty if no segment asks for them. If any sequence is in a
    beam group, there is one entry of `candidates` per token: a beam's token means nothing, and
    other sequences' candidates are empty. `likeliest` holds, per token, the likeliest tokens at its
    position by the same distribution, as many as the most that any segment asks for; empty if none
    does.

    `scores` are the log-probabilities of all segments' targets, one after the other, by the same
    distribution; NaN where the logits are not finite.
    """

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    candidates: tuple[Candidates, ...] = ()
    likeliest: tuple[Likeliest, ...] = ()
    scores: tuple[float, ...] = ()


def wanted_logits(segments: Seq[Segment]) -> NDArray[np.int64]:
    """Indices of the step's tokens whose logits are wanted, `[N]` int64.

    Those after which tokens are sampled come first, then those after which known ones are scored.
    """
    last: list[int] = []
    scored: list[int] = []
    end = 0
    for segment in segments:
        end += segment.length
        if segment.sampled:
            last += range(end - 1 - segment.num_drafts, end)
        elif segment.targets:
            scored += range(end - len(segment.targets), end)
    return np.array(last + scored, np.int64)


def targets_of(segments: Seq[Segment]) -> Targets:
    """All segments' targets: rows of the scored logits, and tokens. None if there are none."""
    each = [wanted for segment in segments for wanted in segment.targets]
    if not each:
        return None
    places = np.repeat(np.arange(len(each)), [len(wanted) for wanted in each])
    return np.array([places, [token for wanted in each for token in wanted]], np.int64)
