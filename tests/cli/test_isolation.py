"""What lies in the folder where a user types `batchrun` is data: none of it is executed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchrun import children
from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import Lease, held_by
from batchrun.runner import supervisor
from tests.cli.conftest import CommandLine

OURS = ("allocator", "jobs", "tests")
OTHERS = ("click", "jinja2", "numpy", "pyarrow", "safetensors", "tokenizers", "torch", "tqdm")
MORE = ("transformers", "triton", "regex", "yaml", "sitecustomize", "usercustomize", "datasets")
LOADED = "import runpy, sys; print(*{name.partition('.')[0] for name in sys.modules})"


@pytest.fixture
def ran(batchrun: CommandLine) -> Path:
    """Lays a module of each name that may be imported beside the data; the file they write to."""
    folder, ran = batchrun.folder, batchrun.folder.parent / "ran"
    code = f"open({str(ran)!r}, 'a').write(__name__ + '\\n')\nraise SystemExit('executed')\n"
    # `python -m` itself looks for these in the folder, before any line of ours.
    python = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)  # noqa: PLW1510
    for name in {*sys.stdlib_module_names, *OURS, *OTHERS, *MORE} - {*python.stdout.split()}:
        (folder / f"{name}.py").write_text(code)
    return ran


def test_modules_beside_the_data_are_not_executed(batchrun: CommandLine, ran: Path) -> None:
    source = batchrun.write("in.jsonl", ["one", "two"])
    shown = batchrun.submit(source, "-o", "out.jsonl", "--max-tokens", 2)
    assert not ran.exists(), ran.read_text()
    assert shown.code == 0, shown.err
    assert len(batchrun.read("out.jsonl")) == 2


def test_what_a_job_starts_executes_nothing_of_the_folder_either(
    batchrun: CommandLine, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty entry of a path, as of `PYTHONPATH=$PYTHONPATH:/mine`, means the folder too."""
    monkeypatch.setenv("PYTHONPATH", ":/mine:")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/cuda/lib64:")
    code = (
        "import os, random, sys; from batchrun.runner import supervisor as s; print(s.__file__)\n"
        "print(os.environ['LD_LIBRARY_PATH'], *sys.path, sep='|')\n"
    )
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    done = subprocess.run(
        [sys.executable, "-c", grandchild],
        cwd=batchrun.folder,
        capture_output=True,
        text=True,
        check=False,
        **children.inheriting(),
    )
    assert not ran.exists(), ran.read_text()
    ours, paths = done.stdout.splitlines()
    assert ours == supervisor.__file__
    libraries, *folders = paths.split("|")
    assert libraries == "/cuda/lib64"
    assert "/mine" in folders
    assert not {"", ".", str(batchrun.folder)} & {*folders}


def test_an_interpreter_that_is_gone_is_one_clear_error(
    batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", ["one"])))
    monkeypatch.setattr(sys, "executable", "/gone/python")
    with Lease(job.path) as lease, pytest.raises(JobError) as error:
        supervisor.start(job, lease)
    assert str(error.value) == (
        "the job's supervisor can't be started: /gone/python: No such file or directory"
    )
    assert held_by(job.path) is None
