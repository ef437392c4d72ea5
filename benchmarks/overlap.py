"""Draft tokens where steps overlap: which rows should wait for them, on a device that is a formula.

    python -m benchmarks.overlap

The real scheduler and engine loop run over a clock instead of a device. Launching and collecting a
step takes the host `HOST` and some for each row; the device takes a time for the weights, one for
each token and one for each key read. A row's text is as predictable as it is said to be. The ways:

    plain     no draft tokens; steps overlap
    together  all rows take draft tokens, and each step waits for the one before it
    apart     rows take draft tokens where that pays, and sit out; other rows' steps overlap

The last line of stdout is one JSON object: tokens per second.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from datetime import date
from itertools import product
from unittest.mock import patch

from batchrun.allocator.arena import KVArena
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.engine import Engine
from batchrun.engine.executor import Ticket
from batchrun.engine.plan import Masks, StepOutput, StepPlan
from batchrun.engine.prefixes import KEPT
from batchrun.engine.scheduler import Scheduler
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.lookup import Lookup
from batchrun.engine.speculation.speculator import Speculator

PROMPT, ANSWER, PAGE = 64, 400, 1 << 16
STEPS = 1000  # of which a speed is measured; there are always rows to come
DRAFTS = 64  # draft tokens of a step
HOST, HOST_ROW = 0.4e-3, 8e-6  # seconds
LAUNCH = 1.5e-3  # of a step with prompts, for all its layers


@dataclass(frozen=True)
class Device:
    """Seconds of a step: for the weights, for each token, and for each key that a row reads."""

    weights: float
    token: float
    key: float


DEVICES = {
    "0.6B": Device(0.5e-3, 1.5e-6, 2.7e-8),  # bfloat16 on an H200, by its bandwidth and products
    "8B": Device(3.8e-3, 2.0e-5, 3.0e-8),
}
ROWS = (1, 4, 16, 64)
RIGHT = (0.0, 0.5, 0.8, 0.95)  # how often a guess is right
SHARES = (1.0, 0.25)  # of rows whose text is so predictable; others' guesses are never right
WAYS = ("plain", "together", "apart")


class Clock:
    """An executor whose steps take what the formula says; all tokens are 0."""

    on_host = False

    def __init__(self, device: Device, lag: int) -> None:
        self.device, self.lag = device, lag
        self.now = self._free = 0.0  # the host's time, and when the device has nothing to do
        self._queue: deque[tuple[StepPlan, float]] = deque()

    def seconds(self) -> tuple[float, float]:
        """Nobody asks."""
        return 0.0, 0.0

    def launch(self, plan: StepPlan) -> Ticket:
        """Let the host's time pass, and begin when the device is free."""
        tokens = sum(s.length for s in plan.segments)
        single = all(s.length == s.num_drafts + 1 for s in plan.segments)
        keys = sum(s.start * (s.num_drafts + 1) for s in plan.segments)
        self.now += HOST + HOST_ROW * len(plan.segments)
        begin = max(self.now, self._free)
        self.now += 0.0 if single else LAUNCH
        device = self.device
        seconds = device.weights + device.token * tokens + device.key * keys
        self._free = max(begin + seconds, self.now)
        self._queue.append((plan, self._free))
        return Ticket(plan.step)

    def sample(self, ticket: Ticket, masks: Masks | None = None) -> None:
        """Nothing."""

    def collect(self, ticket: Ticket) -> StepOutput:
        """Wait for the oldest step."""
        plan, end = self._queue.popleft()
        self.now = max(self.now, end)
        count = sum(s.num_drafts + 1 for s in plan.segments if s.sampled)
        return StepOutput(ticket.step, (0,) * count)

    def busy(self) -> bool:
        """Whether a step is not over."""
        return self._free > self.now


class Guesses(Lookup):
    """Guesses that are right as often as they should be: which ones is drawn for each position."""

    share = 1.0
    right = 0.0

    def find(self, most: int) -> list[int]:
        """See `Lookup.find`."""
        self.length = 3
        known, row = self._sequence.num_known_tokens, self._sequence.request.row
        likely = self.right if (row * 0.618034) % 1 < self.share else 0.0
        return [int(_drawn(row, place) >= likely) for place in range(known, known + most)]


def _drawn(row: int, place: int) -> float:
    return ((row * 2654435761 + place * 40503 * 65537) % 1_000_003 * 7919) % 1_000_003 / 1_000_003


def speed(device: Device, rows: int, right: float, share: float, way: str) -> float:
    """Tokens per second of that many rows at once."""
    lag = int(way != "together")
    memory = HostMemory(PAGE)
    layout = KVLayout((LayerKV(1, 2, 2),), 4, PAGE, 1024, 1)
    arena = KVArena(memory, layout, num_slots=rows + KEPT, budget=None)
    made = type("Made", (Guesses,), {"share": share, "right": right})
    proposer = Speculator(rows + DRAFTS, StepCost(0), lookup=made, overlap=lag > 0)
    scheduler = Scheduler(
        arena,
        max_num_seqs=rows,
        max_num_batched_tokens=2048,
        max_model_len=1024,
        share=False,
        proposer=None if way == "plain" else proposer,
        overlap=lag > 0,
    )
    clock = Clock(device, lag)
    engine = Engine(clock, scheduler, None, frozenset())
    params = SamplingParams(max_tokens=ANSWER)
    row = 0
    with patch.object(time, "perf_counter", lambda: clock.now):  # what steps cost is measured by it
        while engine.stats.steps < STEPS:
            while len(scheduler.waiting) < rows:
                engine.add(Request(row, 0, (1,) * PROMPT, params, 0))
                row += 1
            engine.step()
    arena.release()
    memory.close()
    return engine.stats.generated_tokens / clock.now


def main() -> None:
    """Print a table per device, then everything as JSON."""
    found: dict[str, dict[str, float]] = {}
    print(f"{'device':8}{'rows':>6}{'right':>7}{'share':>7}" + "".join(f"{w:>10}" for w in WAYS))
    for name, rows, right, share in product(DEVICES, ROWS, RIGHT, SHARES):
        if right == 0 and share < 1:
            continue
        each = {way: speed(DEVICES[name], rows, right, share, way) for way in WAYS}
        found[f"{name}-{rows}-{right}-{share}"] = {way: round(v) for way, v in each.items()}
        print(
            f"{name:8}{rows:6}{right:7.2f}{share:7.2f}"
            + "".join(f"{v:10,.0f}" for v in each.values()),
            flush=True,
        )
    command, today = "python -m benchmarks.overlap", f"{date.today()}"
    made = {"benchmark": "overlap", "command": command, "date": today, "speeds": found}
    print(json.dumps(made))


if __name__ == "__main__":
    main()
