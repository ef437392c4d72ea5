"""How well a run tells the time that is left.

    python -m benchmarks.outlook [JOB...] [--record FOLDER]

Each job runs as `submit` would run it, and each estimate is compared with what the time left turned
out to be. `--record` keeps what each estimate was made from, for tests/test_outlook.py. The last
line of stdout is one JSON object: for each job the share of estimates, from a tenth of the job on,
that were within a quarter of the truth.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq

from batchrun import machine
from batchrun.estimate.outlook import Countdown, InFlight, Left, Lengths, Outlook
from benchmarks.workloads import generate, write

FROM, WITHIN = 0.1, 0.25  # of the job, and of the truth
ABSOLUTE = 0.025  # of the job: the end's seconds are not told apart
FIGURES = (
    *("engine_s", "steps", "prefill_tokens", "decode_tokens", "drafted_tokens", "accepted_tokens"),
    *("forced_tokens", "generated_tokens", "shared_tokens", "sequence_s", "kv_s", "kv_live_s"),
)
MANNERS = ("", "Be brief. ", "Explain as to a child. ", "Give an example. ", "Answer as a poet. ")
CHAT = {"workload": "chats", "chat": True, "temperature": 0.8}
JOBS: dict[str, dict[str, Any]] = {
    "waves": {**CHAT, "max_tokens": 160, "max_num_seqs": 32},
    "one-batch": {**CHAT, "max_tokens": 200, "limit": 200},
    "plain": {"workload": "mixed", "max_num_seqs": 32},
    "tail": {"workload": "long-tail", "max_num_seqs": 32},
    "prefixes": {"workload": "shared-prefix", "max_num_seqs": 64},
}


class Recorder:
    """Takes the place of what a run asks for the time left, and keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._ended: list[list[int]] = []
        self.start: dict[str, Any] = {}

    def __enter__(self) -> Recorder:
        begin, left, add = Outlook.__init__, Outlook.left, Lengths.add
        recorder = self

        def begun(outlook: Outlook, earlier: Any, places: int, **more: Any) -> None:
            recorder.start = {"earlier": earlier and asdict(earlier), "places": places, **more}
            begin(outlook, earlier, places, **more)

        def told(outlook: Outlook, figures: Any, rows: InFlight, engines: int = 1) -> Left | None:
            recorder.entries.append(
                {
                    "figures": {name: figures[name] for name in FIGURES},
                    "rows": asdict(rows),
                    "ended": recorder._ended,
                }
            )
            recorder._ended = []
            return left(outlook, figures, rows, engines)

        def added(lengths: Lengths, tokens: int, allowed: int) -> None:
            recorder._ended.append([tokens, allowed])
            add(lengths, tokens, allowed)

        self._patches = [
            patch.object(Outlook, "__init__", begun),
            patch.object(Outlook, "left", told),
            patch.object(Lengths, "add", added),
        ]
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._patches:
            each.stop()

    def save(self, path: Path, seconds: float) -> None:
        """Write the recording."""
        found = {**self.start, "seconds": seconds, "entries": self.entries}
        with gzip.GzipFile(path, "w", mtime=0) as file:
            file.write(json.dumps(found, separators=(",", ":")).encode())


def replayed(recording: Mapping[str, Any]) -> list[tuple[float, Left]]:
    """What was shown when, in seconds of the engine's time."""
    from batchrun.estimate.measured import Measured  # noqa: PLC0415

    earlier = recording["earlier"]
    outlook = Outlook(
        None if earlier is None else Measured(**earlier),
        recording["places"],
        stops=recording["stops"],
        alike=recording["alike"],
    )
    countdown, shown = Countdown(), []
    for entry in recording["entries"]:
        for tokens, allowed in entry["ended"]:
            outlook.lengths.add(tokens, allowed)
        figures = entry["figures"]
        found = outlook.left(figures, InFlight(**entry["rows"]))
        if found is not None:
            at = figures["engine_s"]
            shown.append((at, countdown.shown(at + 1.0, found)))
    return shown


def judged(recording: Mapping[str, Any]) -> dict[str, float]:
    """How many of the estimates were right, and how far off the others were."""
    total = recording["seconds"]
    errors, inside, rises = [], 0, 0.0
    before: float | None = None
    for at, left in replayed(recording):
        truth = max(0.0, total - at)
        if before is not None:
            rises = max(rises, (left.seconds - before) / total)
        before = left.seconds
        if at < FROM * total:
            continue
        errors.append(max(0.0, abs(left.seconds - truth) - ABSOLUTE * total) / max(truth, 1e-9))
        inside += left.least <= truth + ABSOLUTE * total and truth - ABSOLUTE * total <= left.most
    return {
        "seconds": round(total, 1),
        "within": sum(error <= WITHIN for error in errors) / max(1, len(errors)),
        "worst": round(max(errors, default=0.0), 3),
        "in_range": inside / max(1, len(errors)),
        "rise": round(rises, 3),
    }


def chats() -> Iterator[dict[str, str]]:
    """The prompts of the examples, each asked in several manners, in random order."""
    prompts = pq.read_table("examples/prompts.parquet")["prompt"].to_pylist()
    rows = [{"prompt": manner + prompt} for manner in MANNERS for prompt in prompts]
    random.Random(0).shuffle(rows)
    yield from rows


def run(name: str, folder: Path, record: Path | None) -> dict[str, float]:
    """Run a job, and judge what it told."""
    from batchrun.jobs.folder import create, home  # noqa: PLC0415
    from batchrun.runner.job_run import run_job  # noqa: PLC0415
    from batchrun.specs import make_spec  # noqa: PLC0415

    options = dict(JOBS[name])
    workload = options.pop("workload", None)
    if workload is not None:
        path = folder / f"{name}.jsonl"
        if workload == "chats":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in chats()), encoding="utf-8")
        else:
            write(path, generate(workload))
        options["inputs"] = [str(path)]
    inputs: Sequence[str] = options.pop("inputs")
    output = folder / f"{name}-out.jsonl"
    spec = make_spec(list(inputs), home(), {**options, "output": str(output)}, log=print)
    with Recorder() as recorder:
        last: dict[str, Any] = {}
        job = create(home(), spec)
        run_job(job.path, stop=threading.Event())
        with job.journal() as journal:
            last = journal.runs()[-1]["stats"]
    found = {**recorder.start, "seconds": last["engine_s"], "entries": recorder.entries}
    if record is not None:
        recorder.save(record / f"{name}.json.gz", last["engine_s"])
    return judged(found)


def main() -> None:
    """Run the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], metavar="JOB")
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ.setdefault("BATCHRUN_HOME", place)
        machine.use_cores()
        found = {name: run(name, Path(place), asked.record) for name in asked.jobs or JOBS}
    for name, figures in found.items():
        print(name, json.dumps(figures))
    print(json.dumps({"machine": machine.description(), "jobs": found}))


if __name__ == "__main__":
    main()
