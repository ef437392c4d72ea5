"""Jobs whose rows real worker processes compute, with a tiny real model."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import MachineError, ModelError
from batchrun.jobs import folder
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.jobs.verify import verify
from batchrun.models.resolve import ModelRef, resolve
from batchrun.report.text import render
from batchrun.runner.job_run import Outcome, run_job
from batchrun.runner.live import Progress
from tests.tiny import write_tiny_model

ROWS = 60
Submit = Callable[..., JobFolder]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    root = tmp_path_factory.mktemp("model")
    return resolve(str(write_tiny_model(root / "tiny")), root)


@pytest.fixture
def submit(tmp_path: Path, tiny: ModelRef, monkeypatch: pytest.MonkeyPatch) -> Submit:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path))
    prompts = [f"{'alike ' * (i // 6 % 4 * 6)}row {i % 50}" for i in range(ROWS)]
    prompts[7] = "no room for it " * 40
    path = tmp_path / "in.parquet"
    columns = {"prompt": prompts, "temperature": [i % 2 * 0.8 for i in range(ROWS)]}
    pq.write_table(pa.table(columns), path)

    def make(devices: str | None = "cpu:2", **changes: Any) -> JobFolder:
        number = len(list(tmp_path.glob("out-*")))
        output = tmp_path / f"out-{number}.parquet"
        output.touch()
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 4096}
        spec = JobSpec(
            inputs=(InputFile.of(path),),
            input_format="parquet",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec("tiny", str(tiny.path), tiny.fingerprint, "float32"),
            sampling=SamplingSpec(max_tokens=40, ignore_eos=True),  # see `held_after`
            seed=4,
            output=OutputSpec(str(output), "parquet", token_ids=True, overwrite=True),
            runtime=RuntimeSpec(devices=devices, **limits),
        )
        return folder.create(tmp_path, replace(spec, **changes))

    return make


def run(job: JobFolder, **more: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    stop = more.pop("stop", threading.Event())
    return run_job(job.path, stop=stop, log=said.append, **more), said


def output(job: JobFolder) -> pa.Table:
    return pq.read_table(job.spec().output.path)


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            if "run-worker" in process.cmdline():
                found.append(process)
    return found


@pytest.fixture
def want(submit: Submit) -> pa.Table:
    """What one engine in this process answers."""
    alone = submit(None)
    assert run(alone)[0] is Outcome.DONE_WITH_ERRORS
    return output(alone)


def test_two_workers_answer_as_one(submit: Submit, want: pa.Table) -> None:
    seen: list[Progress] = []
    job = submit()
    assert run(job, on_progress=seen.append)[0] is Outcome.DONE_WITH_ERRORS
    assert output(job).equals(want)
    assert verify(job) == []
    assert workers() == []
    assert max(progress.running for progress in seen) > 4  # more than one has places for
    stats = summarise(job)
    names = [device["device"] for device in stats["devices"]]
    assert names == ["cpu:0", "cpu:1"]
    rows = [device["rows"] for device in stats["devices"]]
    assert sum(rows) == ROWS - stats["duplicates"]["rows"]
    assert min(rows) > 5
    tokens = sum(device["generated_tokens"] for device in stats["devices"])
    assert tokens == stats["tokens"]["completion"] - stats["duplicates"]["tokens"]
    assert stats["batch"]["max_num_seqs"] == 8
    assert stats["deterministic"]
    assert "\n  cpu:1 " in render(stats)
    assert json.loads((job.path / "stats.json").read_text())["devices"] == stats["devices"]


def test_workers_that_are_killed_give_their_rows_back(
    submit: Submit, want: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice by somebody, and twice by a fault, for which the rows in it may be to blame."""
    opened = tmp_path / "opened"
    in_workers(tmp_path, monkeypatch, held_after(12, opened))
    kills = [signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGSEGV]
    running = [8, 8, 8, 5]  # of the last four, those of the worker before are alone now

    def kill(progress: Progress) -> None:
        if kills and len(workers()) == 2 and progress.running == running[-len(kills)]:
            oldest = min(workers(), key=lambda p: p.create_time())
            oldest.send_signal(kills.pop(0))
            if not kills:
                opened.touch()

    runtime = replace(submit().spec().runtime, drafts=False)  # or some would end before
    job = submit(runtime=runtime)
    outcome, said = run(job, on_progress=kill)
    assert outcome is Outcome.DONE_WITH_ERRORS
    assert kills == []
    assert output(job).equals(want)
    with job.journal() as journal:
        assert [*journal.crash_counts().values()] == [1] * 8
    lines = [line for line in said if "it restarts" in line]
    assert sum("was killed by SIGKILL" in line for line in lines) == 2
    assert sum("crashed with SIGSEGV, with 4 rows running" in line for line in lines) == 2


def test_workers_may_die_before_any_is_ready(submit: Submit, want: pa.Table) -> None:
    struck = threading.Event()

    def strike() -> None:
        while len(found := workers()) < 2:
            struck.wait(0.01)
        for process in found:
            process.kill()
        struck.set()

    thread = threading.Thread(target=strike)
    thread.start()
    job = submit()
    outcome, said = run(job)
    thread.join()
    assert outcome is Outcome.DONE_WITH_ERRORS
    assert sum("SIGKILL; it restarts" in line for line in said) == 2
    assert output(job).equals(want)


def test_a_row_that_crashes_its_worker_twice_ends_as_an_error(
    submit: Submit, want: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workers(
        tmp_path,
        monkeypatch,
        "add = bench.engine.add\n"
        "        def crashing(request):\n"
        "            if request.row == 20: os.abort()\n"
        "            add(request)\n"
        "        bench.engine.add = crashing",
    )
    job = submit()
    outcome, said = run(job)
    assert outcome is Outcome.DONE_WITH_ERRORS
    found = output(job)
    errors = found["error"].to_pylist()
    assert errors[20] == "the process crashed 2 times on this row"
    assert [i for i, error in enumerate(errors) if error] == [7, 20]
    keep = [i for i in range(ROWS) if i != 20]
    assert found.take(keep).equals(want.take(keep).cast(found.schema))
    assert sum("crashed with SIGABRT" in line for line in said) == 2


def test_a_device_that_is_lost_leaves_a_smaller_fleet(
    submit: Submit, want: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workers(
        tmp_path,
        monkeypatch,
        "from batchrun.errors import MachineError\n"
        "        step, steps = bench.engine.step, iter(range(20))\n"
        "        def failing():\n"
        "            if '/workers/1' in notes and next(steps, None) is None:\n"
        "                raise MachineError('the device fell off the bus')\n"
        "            return step()\n"
        "        bench.engine.step = failing",
    )
    job = submit()
    outcome, said = run(job)
    assert outcome is Outcome.DONE_WITH_ERRORS
    assert output(job).equals(want)
    lost = [line for line in said if "lost" in line]
    assert lost == [
        "cpu:1 is lost: the device fell off the bus; the job continues with 1 of 2 devices"
    ]
    assert summarise(job)["devices"][1]["lost"] == "the device fell off the bus"
    assert "lost: the device fell off the bus" in render(summarise(job))


def test_without_any_device_the_run_ends_and_can_be_resumed(
    submit: Submit, want: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_workers(
        tmp_path,
        monkeypatch,
        "from batchrun.errors import MachineError\n"
        "        step, steps = bench.engine.step, iter(range(60))\n"
        "        def failing():\n"
        "            if next(steps, None) is None: raise MachineError('it is gone', 'look')\n"
        "            return step()\n"
        "        bench.engine.step = failing",
    )
    # A row takes 40 steps, and the job more than 60 of two workers.
    job = submit(runtime=replace(submit().spec().runtime, drafts=False))
    with pytest.raises(MachineError, match="it is gone"):
        run(job)
    assert job.state() == "failed"
    assert workers() == []
    with job.journal() as journal:
        assert 0 < journal.counts().samples < ROWS
    (tmp_path / "site" / "sitecustomize.py").unlink()
    assert run(job)[0] is Outcome.DONE_WITH_ERRORS
    assert output(job).equals(want)


def test_a_stopped_job_keeps_the_tokens_of_its_rows(
    submit: Submit, want: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, opened = threading.Event(), tmp_path / "opened"
    in_workers(tmp_path, monkeypatch, held_after(12, opened))

    def halt(progress: Progress) -> None:
        if progress.running == 8:
            stop.set()

    runtime = replace(submit().spec().runtime, drafts=False)
    job = submit(runtime=runtime)
    assert run(job, stop=stop, on_progress=halt)[0] is Outcome.INTERRUPTED
    assert workers() == []
    with job.journal() as journal:
        assert len(journal.partials()) == 8
    opened.touch()
    assert run(job)[0] is Outcome.DONE_WITH_ERRORS
    assert output(job).equals(want)
    assert summarise(job)["tokens"]["recomputed"] == 0


def test_a_model_that_no_worker_can_load_is_said_once(submit: Submit, tmp_path: Path) -> None:
    job = submit(model=replace(submit().spec().model, max_model_len=10_000))
    with pytest.raises(ModelError, match=r"10,?000"):
        run(job)
    assert workers() == []


def held_after(steps: int, opened: Path) -> str:
    """Code for workers that compute some steps, and no more before there is a file.

    A row that three of them had, one after the other, must not have ended.
    """
    return (
        "import time\n"
        f"        step, steps = bench.engine.step, iter(range({steps}))\n"
        "        def held():\n"
        f"            if next(steps, None) is None and not os.path.exists({str(opened)!r}):\n"
        "                time.sleep(0.01)\n"
        "                return []\n"
        "            return step()\n"
        "        bench.engine.step = held"
    )


def in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have workers run some code once they have an engine, `bench`; its notes are in `notes`."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'run-worker' in sys.orig_argv:\n"
        "    from batchrun.fleet import worker\n"
        "    opening, notes = worker.open_runtime, ''\n"
        "    noted = worker.InFlightRows\n"
        "    def noting(folder):\n"
        "        global notes\n"
        "        notes = str(folder)\n"
        "        return noted(folder)\n"
        "    worker.InFlightRows = noting\n"
        "    def opened(*arguments):\n"
        "        bench = opening(*arguments)\n"
        f"        {code}\n"
        "        return bench\n"
        "    worker.open_runtime = opened\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{place}:{os.environ.get('PYTHONPATH', '')}")
