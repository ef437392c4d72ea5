"""What a plan saves, in tokens and steps: the real scheduler and KV memory, without a model.

    python -m benchmarks.plancounts

Workloads of `benchmarks.workloads` go through the engine planned and not; a word is a token. What
is counted is what a real job would compute, and no other load on the machine changes it. Beside it
stands what `batchrun stats` would say of the planned one: that is an estimate. The last line of
stdout is one JSON object.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from batchrun.allocator.arena import KVArena
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.engine import Engine
from batchrun.engine.executor import Ticket
from batchrun.engine.plan import Masks, StepOutput, StepPlan
from batchrun.engine.prefixes import KEPT
from batchrun.engine.scheduler import Scheduler
from batchrun.estimate.savings import Savings
from batchrun.runner.planner import Planner, Waiting
from batchrun.runner.reader import HANDED_REQUESTS, QUEUED_REQUESTS
from benchmarks.workloads import generate

SEQUENCES, BUDGET = 64, 512  # at once; tokens of a step
TAKEN = QUEUED_REQUESTS + HANDED_REQUESTS  # before a row has ended
LONGEST, PAGE = 8192, 1 << 16  # tokens; bytes
COUNTED = (
    ("shared-prefix", 2000),
    ("documents", 1000),
    ("documents", 4000),
    ("documents", 12_000),
    ("long-tail", 2000),
    ("mixed", 160),
    ("mixed", 2000),
)


class NoModel:
    """An executor that computes nothing and answers 1."""

    lag = 0
    on_host = False

    def __init__(self) -> None:
        self.tokens = self.sequences = 0
        self._plan: StepPlan | None = None

    def seconds(self) -> tuple[float, float]:
        """No device has any."""
        return 0.0, 0.0

    def launch(self, plan: StepPlan) -> Ticket:
        """Count it."""
        self.tokens += sum(s.length for s in plan.segments)
        self.sequences += len(plan.segments)
        self._plan = plan
        return Ticket(plan.step)

    def sample(self, ticket: Ticket, masks: Masks | None = None) -> None:
        """Nothing."""

    def collect(self, ticket: Ticket) -> StepOutput:
        """A token for each that asks for one."""
        assert self._plan is not None
        return StepOutput(ticket.step, (1,) * sum(s.sampled for s in self._plan.segments))

    def busy(self) -> bool:
        """Never."""
        return False


def count(name: str, rows: int, *, planned: bool) -> dict[str, Any]:
    """Tokens and steps of a workload, its words being its tokens."""
    layout = KVLayout((LayerKV(1, 2, 2),), 4, PAGE, LONGEST, 1)
    memory = HostMemory(PAGE)
    arena = KVArena(memory, layout, num_slots=SEQUENCES + KEPT, budget=1 << 30)
    limits = {
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": BUDGET,
        "max_model_len": LONGEST,
    }
    scheduler, executor = Scheduler(arena, **limits), NoModel()
    engine = Engine(executor, scheduler, None, frozenset())
    planner, savings = Planner(), Savings(SEQUENCES, BUDGET, share=True)
    made: Iterator[Waiting] = (
        Waiting.of(
            Request(
                i,
                0,
                tuple(zlib.crc32(word.encode()) & 0xFFFF for word in row.prompt.split()),
                SamplingParams(max_tokens=row.max_tokens, ignore_eos=row.ignore_eos),
                0,
            )
        )
        for i, row in enumerate(generate(name, rows))
    )
    given = 0
    # On a CPU a file of some thousand rows has been read before the engine's queue has moved.
    if planned:
        made = planner.planned(_told(made, savings.read), lambda: given >= TAKEN)
    source = _told(made, savings.put)
    more = True
    while more or engine.has_work:
        while more and len(scheduler.waiting) < QUEUED_REQUESTS:
            waiting = next(source, None)
            more = waiting is not None
            if waiting is not None:
                given += 1
                engine.add(waiting.request())
        for completion in engine.step() if engine.has_work else ():
            savings.end(completion.request.row, 0, len(completion.token_ids))
    arena.release()
    memory.close()
    steps = engine.stats.steps
    shared, saved = scheduler.stays.num_shared_tokens, savings.saved()
    return {
        "computed": executor.tokens,
        "shared": shared,
        "steps": steps,
        "mean": executor.sequences / steps,
        **({"saved": [saved.prompt_tokens, round(saved.steps * steps)]} if planned else {}),
    }


def _told(rows: Iterable[Waiting], told: Callable[[Waiting, float], None]) -> Iterator[Waiting]:
    for row in rows:
        told(row, row.rest.params.max_tokens)
        yield row


def counts() -> dict[str, Any]:
    """Workloads planned and not."""
    found: dict[str, Any] = {}
    for name, rows in COUNTED:
        found[f"{name}-{rows}"] = both = {
            "planned": count(name, rows, planned=True),
            "unplanned": count(name, rows, planned=False),
        }
        both["ratio"] = both["unplanned"]["computed"] / both["planned"]["computed"]
        print(f"{name}, {rows:,} rows: {both}", flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps({"benchmark": "plancounts", "workloads": counts()}))
