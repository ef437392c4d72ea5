"""What is handed to an executor and comes back: values, for any process. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.allocator.sharing import MemoryCopy
from batchrun.engine.core import Candidates, Likeliest, Request, Segment


@dataclass(frozen=True, slots=True)
class NewSequence:
    """What has come to a slot: a request, and the output that it has by then."""

    slot: int
    request: Request
    output_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The segments of one step, single-token ones (decodes) first: a value, for any process.

    `new` are the sequences that are in their slots for the first time: who computes steps keeps
    what it needs of them, and other plans name no more than their slots. `copies` are to be made in
    KV memory before the segments, in their order, and after step `copies_after`, the last one that
    uses what they read and write. Steps behind that may still run.
    """

    step: int
    segments: tuple[Segment, ...]
    new: tuple[NewSequence, ...] = ()
    copies: tuple[MemoryCopy, ...] = ()
    copies_after: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced: the token after each sampled segment, in the plan's order.

    Those of a segment with draft tokens are one after what is known, and one after each of them.

    A token below 0 says that the logits it was to be chosen by are not finite.

    `logprobs` are their log-probabilities under the model's own distribution, before penalties,
    temperature and filters; none where no segment's parameters ask for them. Where
    any sequence is in a beam group there are as many `candidates`: of one that is, its token means
    nothing; others have none. `likeliest` are as many tokens in the place of each as any parameters
    ask for, by that distribution, the likeliest first; none where none do.
    """

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    candidates: tuple[Candidates, ...] = ()
    likeliest: tuple[Likeliest, ...] = ()
