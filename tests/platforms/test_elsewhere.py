"""A job that was copied from Linux can be read on macOS and Windows; only computing needs Linux."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement

from batchrun.jobs.folder import create
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.objectstore.paths import moved
from batchrun.runner.live import Reporter
from tests.platforms.elsewhere import WITHOUT
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
NAMES = {"darwin": "macOS", "win32": "Windows"}
assert set(WITHOUT) == set(NAMES)


class Laptop:
    """A copied job and its input, and a system that is not Linux."""

    def __init__(self, system: str, place: Path, job: str, was: Path) -> None:
        self.system, self.place, self.job, self.was = system, place, job, was

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run the command line, or code after `-c`, there."""
        return subprocess.run(
            [sys.executable, "-m", "tests.platforms.elsewhere", self.system, *map(str, words)],
            cwd=self.place,
            env={
                **os.environ,
                "BATCHRUN_HOME": str(self.place / "home"),
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )

    def files(self) -> list[str]:
        """All files there, but those that SQLite makes to read."""
        return sorted(
            str(path.relative_to(self.place))
            for path in self.place.rglob("*")
            if not path.name.endswith(("-shm", "-wal"))
        )


@pytest.fixture(scope="module", params=sorted(NAMES))
def laptop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    server, place = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("laptop")
    source = server / "in.parquet"
    pq.write_table(pa.table({"id": [7, 8, 9], "prompt": ["one", "two", "three"]}), source)
    spec = JobSpec(
        (InputFile.of(source),),
        "parquet",
        PromptSpec(column="prompt"),
        ModelSpec(name="tiny", path="/models/tiny", fingerprint="m1", dtype="float32"),
        SamplingSpec(max_tokens=8),
        output=OutputSpec(path=str(server / "out.parquet"), format="parquet"),
    )
    job = create(server / "home", spec)
    with Lease(job.path), Reporter(job.path) as reporter:
        reporter.message("the model is loaded")
        with job.journal(readonly=False) as journal:
            journal.begin_run()
            journal.set_meta("rows_total", 3)
            journal.write(
                [Result(r, 0, "ok", f"answer {r}", (r,), "stop", 1, 1) for r in (0, 1)]
                + [Result(2, 0, "error", error="no", error_kind="x")]
            )
            export_job(spec, journal, Path(spec.output.path), format="parquet")
            journal.end_run("done-with-errors", {})
        job.set_state("done-with-errors")
    shutil.copytree(server / "home", place / "home")
    shutil.copy(source, place / "in.parquet")
    shutil.rmtree(server)
    return Laptop(request.param, place, job.id, source)


# A command, and what it prints there. `{job}`, `{was}` and `{system}` are filled in.
READERS: dict[str, tuple[str, ...]] = {
    "--help": ("Commands:",),
    "submit --help": ("--max-tokens",),
    "list": ("{job}", "done, 1 failed"),
    "list --json": ('"failed": 1',),
    "show": ("rows", "{was}"),
    "stats": ("{job}",),
    "stats --json": ('"done": 3',),
    "logs {job}": ("the model is loaded",),
    "peek --json": ('"status": "error"',),
    "report -o -": ("<html",),
}


@pytest.mark.parametrize("command", READERS)
def test_what_reads_a_job_works_there(laptop: Laptop, command: str) -> None:
    fill = {"job": laptop.job, "was": laptop.was}
    before = laptop.files()
    done = laptop.run(*command.format(**fill).split())
    assert done.returncode == 0, done.stderr
    for words in READERS[command]:
        assert words.format(**fill) in done.stdout
    assert laptop.files() == before


def test_a_copied_job_is_exported_with_its_copied_input(laptop: Laptop) -> None:
    refused = laptop.run("export", "-o", "none.csv")
    assert refused.returncode == 1
    assert f"{laptop.was}" in refused.stderr
    left = laptop.run("export", "--partial", "-o", "left.csv")
    assert left.returncode == 0, left.stderr
    done = laptop.run("export", "--moved", f"{laptop.was}=in.parquet", "-o", "out.csv")
    assert (done.returncode, done.stdout) == (0, f"3 rows in {laptop.place / 'out.csv'}\n"), (
        done.stderr
    )
    assert (laptop.place / "out.csv").read_text() == (
        "id,prompt,completion,finish_reason,prompt_tokens,completion_tokens,error\n"
        "7,one,answer 0,stop,1,1,\n8,two,answer 1,stop,1,1,\n9,three,,,0,0,no\n"
    )
    again = laptop.run("export", "-o", "out.csv")  # from now on it knows where its input is
    assert again.returncode == 1
    assert "already exists" in again.stderr
    again = laptop.run("export", "-o", "out.csv", "--overwrite")
    assert again.returncode == 0, again.stderr
    printed = laptop.run("export", "-o", "-")
    assert printed.returncode == 0, printed.stderr
    checked = laptop.run("verify")
    assert checked.returncode == 1
    assert "/models/tiny" in checked.stdout  # which was not copied, and neither was the output
    assert checked.stderr == ""
    read = (
        "import batchrun\n"
        "job = batchrun.Job.find()\n"
        "assert job.wait() is job\n"
        "print(repr(job), job.to_pandas()['completion'].tolist()[:2], job.stats()['rows']['done'])"
    )
    done = laptop.run("-c", read)
    assert f"<Job {laptop.job} done-with-errors: 3 rows, 1 failed>" in done.stdout, done.stderr
    assert "['answer 0', 'answer 1'] 3" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "submit in.parquet --detach",
        "submit -",
        "resume --moved {was}=in.parquet",
        "verify --recompute 1",
    ],
)
def test_computing_is_refused_before_anything_is_written(laptop: Laptop, command: str) -> None:
    before = laptop.files()
    refused = laptop.run(*command.format(was=laptop.was).split())
    first, second = refused.stderr.splitlines()
    assert first == f"error: running a model needs Linux; this is {NAMES[laptop.system]}"
    assert "plan, peek, export and report work here" in second
    assert ("WSL 2" in second) == (laptop.system == "win32")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert laptop.files() == before


def test_python_says_so_too(laptop: Laptop) -> None:
    code = (
        "import batchrun\n"
        "from batchrun.errors import MachineError\n"
        "job = batchrun.Job.find()\n"
        "for act in (batchrun.LLM, lambda: batchrun.submit('in.parquet'), job.resume):\n"
        "    try: act()\n"
        "    except MachineError as error: print(error)\n"
    )
    said = laptop.run("-c", code)
    assert said.stdout == f"running a model needs Linux; this is {NAMES[laptop.system]}\n" * 3, (
        said.stderr
    )


def test_doctor_says_what_the_machine_is(laptop: Laptop) -> None:
    found = laptop.run("doctor", "--json")
    assert found.returncode == 1
    shown: dict[str, Any] = json.loads(found.stdout)
    assert shown["problems"] == [f"running a model needs Linux; this is {NAMES[laptop.system]}"]
    assert shown["memory"]["available"] > 0
    if laptop.system == "win32":
        assert shown["memory"] == {"total": 16 << 30, "available": 8 << 30}


def test_a_plan_is_made_there(laptop: Laptop) -> None:
    write_tiny_model(laptop.place / "tiny")
    planned = laptop.run("plan", "in.parquet", "--model", "tiny", "--device", "cpu", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["rows"] == 3


def test_the_files_of_a_job_can_be_removed_there(laptop: Laptop) -> None:
    shutil.copytree(laptop.place / "home", laptop.place / "other")
    removed = laptop.run("rm", laptop.place / "other" / "jobs" / laptop.job)
    assert removed.returncode == 0, removed.stderr
    assert not (laptop.place / "other" / "jobs" / laptop.job).exists()


def test_what_linux_calls_a_path_is_compared_as_text() -> None:
    here: Any = PureWindowsPath("C:/data")
    found = moved("/srv/in/a.parquet", PurePosixPath("/srv/in"), here)
    assert found == r"C:\data\a.parquet"


def test_locks_keep_others_out_there(laptop: Laptop) -> None:
    code = (
        "from batchrun.platforms import flock\n"
        "one, other = open('locked', 'w'), open('locked', 'w')\n"
        "flock(one)\n"
        "try: flock(other, wait=False)\n"
        "except BlockingIOError: print('taken')\n"
        "one.close()\n"
        "flock(other)\n"
        "print('free', other.tell())\n"
    )
    done = laptop.run("-c", code)
    assert done.stdout == "taken\nfree 0\n", done.stderr


@pytest.mark.parametrize("extra", ["", "gguf", "cuda"])
def test_nothing_is_asked_for_that_is_not_there(laptop: Laptop, extra: str) -> None:
    """By the markers: Linux's own libraries, and torch for Macs that it has no release for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for machine, has_torch in (("arm64", True), ("x86_64", laptop.system == "win32")):
        here = {"sys_platform": laptop.system, "platform_machine": machine}
        wanted = {
            found.name
            for found in map(Requirement, lines)
            if found.marker is None or found.marker.evaluate(here)
        }
        assert not wanted & {"cuda-python", "flashinfer-python"}
        assert ("torch" in wanted) == (has_torch and not extra)
