"""Builds what proposes draft tokens for an engine."""

from __future__ import annotations

from collections.abc import Callable

from batchrun.allocator.arena import KVArena
from batchrun.engine import cpu
from batchrun.engine.constraints import Constraints
from batchrun.engine.cpu import Level
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.settings import Settings, logits_bytes
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.model import make_drafts
from batchrun.engine.speculation.speculator import Speculator
from batchrun.engine.speculation.table import AnswerTable

# Draft tokens of a step on a GPU. Steps are recorded with as many tokens more.
GPU_DRAFTS = 64
_DRAFT_LOGITS = 96 << 20  # bytes of a step's logits with draft tokens


def takes_drafts(settings: Settings, executor: TorchExecutor) -> bool:
    """Whether draft tokens are wanted, and attention takes several of each row in one call.

    One call per row costs more than drafts save.
    """
    return settings.drafts and executor.backend.max_query is None


def make_speculator(
    executor: TorchExecutor,
    arena: KVArena,
    settings: Settings,
    *,
    drafter: TorchExecutor | None,
    constraints: Constraints,
    log: Callable[[str], None],
) -> Speculator | None:
    """What proposes draft tokens; None if there should be none.

    Args:
        executor: The model's.
        arena: Its memory, and the draft model's.
        settings: How to run the model.
        drafter: The draft model's, if there is one.
        constraints: Knows which tokens constrained answers allow.
        log: Called with each line that the user should see.
    """
    if not takes_drafts(settings, executor):
        if drafter is not None:
            log(f"the draft model can't be used with {executor.backend.name} attention")
        return None
    loaded = executor.loaded
    limits = settings.limits(str(loaded.device))
    if loaded.device.type == "cpu":
        free = 16 if cpu.level() is Level.TILES else 0  # a tile has 16 rows
        most = max(limits.max_num_seqs, _DRAFT_LOGITS // logits_bytes(loaded))
    else:
        free, most = 0, limits.max_num_seqs + GPU_DRAFTS
    model = None
    if drafter is not None:
        model = make_drafts(
            *(executor, drafter, constraints, arena.ensure, StepCost(free)),
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
    return Speculator(
        *(most, StepCost(free), constraints, AnswerTable()),
        model=model,
        num_tokens=settings.draft_tokens,
        overlap=executor.lag > 0,
    )
