"""Workers that compute nothing, in real processes: what they answer follows from row and place.

    python -m tests.fleet.nulls FOLDER      # the coordinator of a job with such workers

A worker is one of these if `sitecustomize` calls `in_worker`; see `environment`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from batchrun.engine.core import Completion, FinishReason, Request, Sequence
from batchrun.jobs.metrics import recorded
from batchrun.prompts.messages import PromptError

CONTEXT = 100_000
_PACE = "BATCHRUN_TEST_PACE"  # seconds of a step
_SLOTS = 4


def token(row: int, sample: int, position: int) -> int:
    return (row * 7919 + sample * 104729 + position * 31) % 50021


def length(request: Request) -> int:
    return 1 + request.row * 7 % request.params.max_tokens


def answer(row: int, sample: int, most: int) -> list[int]:
    return [token(row, sample, p) for p in range(1 + row * 7 % most)]


@dataclass
class NullEngine:
    """One token a step for each of at most `slots` requests.

    Args:
        pace: Called once a step.
        slots: Sequences that run at a time.
    """

    pace: Callable[[], None] = lambda: None
    slots: int = _SLOTS
    on_admit: Callable[[Request], None] = lambda _: None
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    tokens: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def load(self) -> tuple[int, int, int]:
        return len(self.running), len(self.waiting), self.tokens

    def progress(self) -> list[tuple[int, int]]:
        return []

    def add(self, request: Request) -> None:
        self.waiting.append(Sequence(request, list(request.generated_ids)))

    def partials(self) -> list[Request]:
        return [_continued(s) for s in (*self.running, *self.waiting) if s.output_ids]

    def release(self, count: int) -> list[tuple[Request, bool]]:
        found = [*reversed(self.waiting), *reversed(self.running)][:count]
        self.waiting = [s for s in self.waiting if s not in found]
        self.running = [s for s in self.running if s not in found]
        return [(_continued(s), s.admitted is not None) for s in found]

    def step(self) -> list[Completion]:
        self.pace()
        while self.waiting and len(self.running) < self.slots:
            sequence = self.waiting.pop(0)
            sequence.admitted = time.perf_counter()
            self.on_admit(sequence.request)
            self.running.append(sequence)
        for s in self.running:
            if len(s.output_ids) < length(s.request):
                s.output_ids.append(token(s.request.row, s.request.sample, len(s.output_ids)))
                self.tokens += 1
        ended = [s for s in self.running if len(s.output_ids) >= length(s.request)]
        self.running = [s for s in self.running if s not in ended]
        for s in ended:
            s.finish_reason, s.text = FinishReason.STOP, " ".join(map(str, s.output_ids))
        return [s.completion() for s in ended]


def _continued(sequence: Sequence) -> Request:
    return replace(sequence.request, generated_ids=tuple(sequence.output_ids))


class NullBench:
    """What surrounds the engine."""

    max_num_seqs, max_num_batched_tokens = _SLOTS, 64
    loaded = SimpleNamespace(max_model_len=CONTEXT)

    def __init__(self) -> None:
        pace = float(os.environ.get(_PACE, "0"))
        self.engine = NullEngine(lambda: time.sleep(pace))

    def measurements(self) -> Mapping[str, Any]:
        running, waiting, tokens = self.engine.load()
        counts = {"running": running, "waiting": waiting, "generated_tokens": tokens}
        return recorded({**counts, "arithmetic": "none", "max_num_seqs": _SLOTS})

    def recall(self, answers: Iterable[Any], constraint: str | None) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> NullBench:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class NullPrompts:
    """A prompt is as many tokens as it has letters."""

    max_num_seqs, max_num_batched_tokens = 2 * _SLOTS, 128

    def __init__(self) -> None:
        from batchrun.engine.model.generation import (  # noqa: PLC0415 - torch, for no worker
            Generation,
        )

        self.generation = Generation()

    def encode(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        if fields["prompt"] is None:
            raise PromptError("no_prompt", "the row has no prompt")
        return tuple(map(ord, fields["prompt"]))


def in_worker() -> None:
    """Have this worker compute nothing."""
    from batchrun.fleet import worker  # noqa: PLC0415

    worker.open_runtime = lambda spec, log: NullBench()


def in_coordinator() -> None:
    """Have this process read no model."""
    from batchrun.fleet import fleet  # noqa: PLC0415

    fleet.read_model = lambda spec: None  # type: ignore[assignment,return-value]
    fleet.model_prompts = lambda *_: NullPrompts()  # type: ignore[assignment,return-value]


def environment(place: Path, pace: float, *, null: bool = True) -> dict[str, str]:
    """Variables for a coordinator and all that it starts.

    Args:
        place: A folder for a file that Python reads when it starts.
        pace: Seconds of a step.
        null: Whether workers compute nothing.
    """
    place.mkdir(exist_ok=True)
    code = "import sys\nif 'run-worker' in sys.orig_argv:\n    from tests.fleet import nulls\n"
    (place / "sitecustomize.py").write_text((code + "    nulls.in_worker()\n") * null)
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([str(place), root, os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, _PACE: str(pace), "RAY_USAGE_STATS_ENABLED": "0"}
    more |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "batchrun" * 8}  # whatever is in ~/.ray
    return {**os.environ, **more, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main(folder: str, *, null: bool) -> int:
    from batchrun.runner import job_run, writer  # noqa: PLC0415

    if null:
        in_coordinator()
    writer._COMMIT_SECONDS = 0.05
    outcome = job_run.run_job(Path(folder), stop=threading.Event(), log=print)
    return 0 if outcome.startswith("done") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], null="--real" not in sys.argv))
