"""What a soak looks for is found; a sample of what it proves that needs no hours."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchrun.jobs import folder
from batchrun.runner import job_run
from batchrun.runner.job_run import Outcome
from tests.faults.smalljob import Ledger, NullEngine, NullWorkbench, SmallJob
from tests.soak.flat import Sample, Watched, left_behind, processes, sample
from tests.soak.works import alike, write

ROWS, EVERY = 6_000, 250
MIB = 1 << 20


def grown(samples: list[Sample]) -> list[str]:
    watched = Watched(dict)
    watched.samples = {"run": samples}
    return list(watched.grown())


def test_a_run_has_late_in_a_job_what_it_had_early(tmp_path: Path) -> None:
    """Memory, maps, handles and threads, by the rows that have ended and not by a clock."""
    small, samples = SmallJob(tmp_path, ROWS), []
    small.write_input()
    taken = 0

    def before_step(ended: int) -> None:
        nonlocal taken
        if ended // EVERY > taken:
            taken = ended // EVERY
            samples.append(sample(os.getpid()))

    engine = NullEngine(Ledger(ROWS), 64, before_step)
    job = folder.create(small.home, small.spec())
    outcome = job_run.run_job(
        job.path, stop=threading.Event(), open_workbench=lambda *_: NullWorkbench(engine)
    )
    assert outcome is Outcome.DONE_WITH_ERRORS
    assert len(samples) > 15
    assert grown(samples) == []
    small.check_output()


@pytest.mark.parametrize(
    ("measure", "late"),
    [
        ("rss", Sample(150 * MIB, 600, 12, 8)),
        ("maps", Sample(100 * MIB, 700, 12, 8)),
        ("handles", Sample(100 * MIB, 600, 40, 8)),
        ("threads", Sample(100 * MIB, 600, 12, 9)),
    ],
)
def test_what_grows_is_named(measure: str, late: Sample) -> None:
    early = Sample(100 * MIB, 600, 12, 8)
    assert grown([early] * 10) == []
    [said] = grown([early] * 8 + [late] * 2)
    assert said.startswith(f"{measure} of the run of a long job grew")


def test_what_is_left_behind_is_found(tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    for path in (home / "jobs", home / "measured", home / "queue" / "cpu", temporary):
        path.mkdir(parents=True)
    (home / "jobs" / ".submitting").touch()
    (home / "measured" / "figures.json").touch()
    assert left_behind(home, temporary) == []
    left = [home / "jobs" / ".x.tmp" / "lock", home / "queue" / "cpu" / "1", temporary / "y"]
    left[0].parent.mkdir()
    for path in left:
        path.touch()
    assert sorted(left_behind(home, temporary)) == sorted(map(str, left))


def test_living_processes_are_found_by_their_mark() -> None:
    mark = f"SOAK_TEST=of-{os.getpid()}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        env={**os.environ, name: value},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert list(processes(mark)) == [child.pid]
        child.kill()
        child.wait()
        assert processes(mark) == {}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_outputs_are_alike_but_for_the_rounding_of_log_probabilities(
    tmp_path: Path, suffix: str
) -> None:
    def written(name: str, *rows: dict[str, object]) -> Path:
        path = tmp_path / f"{name}.{suffix}"
        write(path, list(rows))
        return path

    row: dict[str, object] = {"completion": "a", "mean_logprob": -5.535918965059168}
    one = written("one", row, row)
    assert alike(one, written("same", row, row))
    assert alike(one, written("rounded", row, {**row, "mean_logprob": -5.5359189370099235}))
    for name, others in {
        "other": [row, {**row, "mean_logprob": -5.5}],
        "text": [row, {**row, "completion": "b"}],
        "fewer": [row],
    }.items():
        assert not alike(one, written(name, *others))
