"""One trace of requests under three ways to keep a KV cache.

The scheduler is the real one and so is the arena, over real memory; the executor computes nothing.
Time is counted in steps.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from batchrun.allocator.arena import KVArena
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.engine import core
from batchrun.engine.plan import StepOutput, StepPlan
from batchrun.engine.scheduler import Scheduler
from batchrun.report.text import size
from benchmarks.memory.spaces import CountedSpace, paged_space, static_space

_RECORDED = """
66+13 47+52 151+70 81+38 37+23 44+156 47+111 65+4 45+30 106+36 85+21 46+115 49+77 39+79 82+2
51+54 114+42 92+47 39+15 58+77 49+41 62+16 55+15 122+58 70+28 39+217 51+196 55+15 78+32 62+34
125+46 68+38 44+58 51+512 41+9 74+14 78+75 95+24 96+512 37+176 64+17 90+25 63+512 88+49 87+512
56+334 61+26 78+33 37+512 63+24 57+89 36+127 67+72 74+101 102+42 56+40 41+349 56+24 47+86 74+78
41+41 31+19 52+221 42+246
"""
TRACE = tuple((int(a), int(b)) for a, _, b in (p.partition("+") for p in _RECORDED.split()))
"""Tokens of each prompt in examples/prompts.parquet and of the completion that SmolLM2-135M gave,
at temperature 0.7: `python -m benchmarks.memory --record` makes it."""
MAX_COMPLETION = core.SamplingParams().max_tokens
"""What the recorded job, and any that does not know its completions, allows for."""

_LAG = 1  # steps planned before the one before them is collected, as on a GPU
_PAGE = 4096  # bytes of the real pages that stand for the case's


@dataclass(frozen=True)
class Case:
    """A model's cache and the requests for it.

    Attributes:
        token_bytes: of K and V in all layers.
        page_size: in bytes, a multiple of 4 KiB.
        stretch: factor on the lengths of the trace.
        budget: bytes for keys and values.
        requests: drawn from the trace, each as often as any other.
        chunk: tokens computed in a step at most.
    """

    name: str
    token_bytes: int
    page_size: int
    stretch: int
    budget: int
    requests: int
    chunk: int = 2048

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompt and completion of each request, in an order that mixes them."""
        rounds = [random.Random(seed).sample(TRACE, len(TRACE)) for seed in range(self.requests)]
        drawn = [pair for trace in rounds for pair in trace][: self.requests]
        return [(prompt * self.stretch, out * self.stretch) for prompt, out in drawn]


CASES = (
    Case("Llama-3-8B, bfloat16", 131_072, 2 << 20, 4, 8 << 30, 1024),
    Case("SmolLM2-135M, float32", 46_080, 256 << 10, 1, 256 << 20, 1024),
)


@dataclass(frozen=True, slots=True)
class Moment:
    """One step: sequences in flight, bytes used, and bytes of them that hold tokens."""

    running: int
    used: int
    live: int


@dataclass(frozen=True)
class Run:
    """A trace that was run to its end."""

    moments: list[Moment]
    computed: int
    recomputed: int
    preemptions: int

    def summary(self) -> dict[str, float]:
        """Means over the steps and peaks; bytes, and shares of 1."""
        used, live = self._mean("used"), self._mean("live")
        return {
            "steps": len(self.moments),
            "in_flight_mean": self._mean("running"),
            "in_flight_peak": max(m.running for m in self.moments),
            "used_mean": used,
            "used_peak": max(m.used for m in self.moments),
            "live_mean": live,
            "waste_mean": used - live,
            "utilisation": live / used,
            "preemptions": self.preemptions,
            "recomputed": self.recomputed / self.computed,
        }

    def _mean(self, name: str) -> float:
        return fmean(getattr(moment, name) for moment in self.moments)


def compare(case: Case) -> dict[str, Run]:
    """Run the case under static reservation, 16-token paging, and the arena."""
    lengths, scale = case.lengths(), case.page_size // _PAGE
    max_tokens = max(prompt for prompt, _ in lengths) + MAX_COMPLETION * case.stretch
    # One head of 16-bit elements stands for all of them: only the bytes of a token matter.
    width = case.token_bytes // scale // 4
    layout = KVLayout((LayerKV(1, width, width),), 2, _PAGE, max_tokens, 1)
    budget, slots = case.budget // scale, case.requests
    runs = {
        name: _run(make(layout, budget=budget, num_slots=slots), case, lengths, layout)
        for name, make in (("static", static_space), ("paged", paged_space))
    }
    memory = HostMemory(_PAGE)
    try:
        arena = KVArena(memory, layout, num_slots=slots, budget=budget)
        runs["batchrun"] = _run(arena, case, lengths, layout)
        arena.release()
    finally:
        memory.close()
    return runs


def _run(
    space: KVArena | CountedSpace,
    case: Case,
    lengths: Sequence[tuple[int, int]],
    layout: KVLayout,
) -> Run:
    """Drain the requests through a scheduler over `space`."""
    scheduler = Scheduler(
        space,
        max_num_seqs=len(lengths),
        max_num_batched_tokens=case.chunk,
        max_model_len=layout.max_tokens,
    )
    params = core.SamplingParams(max_tokens=MAX_COMPLETION * case.stretch)
    for row, (prompt, _) in enumerate(lengths):  # no two prompts begin alike
        scheduler.add(core.Sequence(core.Request(row, 0, (row,) * prompt, params, 0)))
    in_flight: deque[StepPlan] = deque()
    moments: list[Moment] = []
    computed, scale = 0, case.page_size // _PAGE
    while scheduler.has_work or in_flight:
        plan = scheduler.plan()
        if plan.segments:
            in_flight.append(plan)
        assert in_flight, f"{len(scheduler.waiting)} requests wait, and none gets memory"
        while len(in_flight) > (_LAG if plan.segments else 0):
            collected = in_flight.popleft()
            used, live = _bytes(space, layout)
            moments.append(Moment(len(scheduler.running), used * scale, live * scale))
            computed += sum(s.length for s in collected.segments)
            _commit(scheduler, collected, lengths)
    return Run(moments, computed, scheduler.stays.num_recomputed_tokens, scheduler.num_preemptions)


def _commit(scheduler: Scheduler, plan: StepPlan, lengths: Sequence[tuple[int, int]]) -> None:
    """Give each sampled segment a token, and end the sequences that have all of theirs."""
    owners = zip(plan.segments, scheduler.stays.owners(plan.segments), strict=True)
    sampled = [sequence for segment, sequence in owners if segment.sampled]
    ended = []
    for sequence in sampled:
        if sequence is not None:
            sequence.output_ids.append(0)
            if len(sequence.output_ids) == lengths[sequence.request.row][1]:
                ended.append(sequence)
    scheduler.commit(plan, StepOutput(plan.step, (0,) * len(sampled)), ended)


def _bytes(space: KVArena | CountedSpace, layout: KVLayout) -> tuple[int, int]:
    if isinstance(space, KVArena):
        usage = space.usage()
        return usage.mapped, usage.live
    return space.used, space.tokens * layout.bytes_per_token


TITLES = {
    "static": "static reservation",
    "paged": "16-token paging",
    "batchrun": "batchrun",
}


def render_case(case: Case, runs: dict[str, Run]) -> str:
    """The comparison as text."""
    head = (
        f"{case.name}: {case.requests} requests, {size(case.budget)} for keys and values, "
        f"pages of {size(case.page_size)}"
    )
    lines = [head, f"{'':<20}{'in flight':>10}{'peak':>6}{'used':>11}{'holds tokens':>14}"]
    lines[1] += f"{'waste':>11}{'steps':>8}{'preempted':>11}{'recomputed':>12}"
    for name, run in runs.items():
        s = run.summary()
        lines.append(
            f"{TITLES[name]:<20}{s['in_flight_mean']:>10.1f}{s['in_flight_peak']:>6}"
            f"{size(s['used_mean']):>11}{s['utilisation']:>14.1%}{size(s['waste_mean']):>11}"
            f"{s['steps']:>8,}{s['preemptions']:>11,}{s['recomputed']:>12.1%}"
        )
    return "\n".join(lines)


def as_dict(case: Case, runs: dict[str, Run]) -> dict[str, Any]:
    """The comparison as JSON: bytes, tokens, and shares of 1."""
    return {**asdict(case), "ways": {name: run.summary() for name, run in runs.items()}}
