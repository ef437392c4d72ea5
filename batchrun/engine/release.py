"""Rows that leave an engine before they end, to be continued in another run or engine."""

from __future__ import annotations

from dataclasses import replace

from batchrun.engine.core import Request, Sequence
from batchrun.engine.scheduler import Scheduler

_WORTH = 2  # tokens computed again for each one that is still to come, at most


def continued(sequence: Sequence) -> Request:
    """A request that continues a sequence where it is. Beam searches begin again."""
    if sequence.group is not None:
        return sequence.request
    return replace(
        sequence.request,
        generated_ids=tuple(sequence.output_ids),
        generated_logprob=sequence.logprob,
        generated_logprobs=tuple(sequence.logprobs),
    )


def releasable(scheduler: Scheduler, count: int) -> list[Sequence]:
    """Up to so many sequences that an idle engine would compute sooner: waiting ones first.

    Of the running ones, the youngest of those with enough to come. The other engine computes their
    tokens so far again, so moving a row that has almost ended would cost more than it saves. Rows
    whose scores are known, and beams, stay.
    """
    waiting = [s for s in scheduler.waiting if _plain(s)]
    running = [s for s in scheduler.running if _plain(s) and _is_worth_moving(s, scheduler)]
    return [*reversed(waiting), *reversed(running)][:count]


def _plain(sequence: Sequence) -> bool:
    return sequence.group is None and sequence.request.scoring is None


def _is_worth_moving(sequence: Sequence, scheduler: Scheduler) -> bool:
    most = min(sequence.most_tokens, scheduler.max_model_len)
    return sequence.num_tokens <= _WORTH * (most - sequence.num_tokens)
