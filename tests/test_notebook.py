"""What a notebook or a Python prompt shows: jobs in a line, DataFrames, bars, errors."""

from __future__ import annotations

import pickle
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from batchrun import Job
from batchrun.errors import MachineError, UserError, sendable
from batchrun.jobs.errors import OptionError
from batchrun.jobs.folder import JobFolder, create
from batchrun.jobs.lease import Lease, held_by
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.queue import DeviceQueue
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.notebook import Bar, pandas_of, polars_of, watched
from tests.tiny import write_tiny_model

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    spec = JobSpec(
        (InputFile.of(path),),
        "jsonl",
        PromptSpec(column="prompt"),
        ModelSpec(name="<b>tiny</b>", path="/models/tiny", fingerprint="m", dtype="float32"),
        SamplingSpec(),
        output=OutputSpec(path=str(tmp_path / "a&b.jsonl"), format="jsonl"),
    )
    return create(tmp_path / "home", spec)


def test_a_job_is_shown_in_one_line_whatever_its_state(job: JobFolder) -> None:
    shown = Job(job)
    assert repr(shown) == f"<Job {job.id} new>"
    with job.journal(readonly=False) as journal:
        journal.set_meta("rows_total", 1200)
    assert repr(shown) == f"<Job {job.id} new: 0 of 1,200 rows>"
    with Lease(job.path):
        job.set_state("running")
        assert repr(shown) == f"<Job {job.id} running: 0 of 1,200 rows>"
    counted = replace(job.snapshot(), state="done-with-errors", total=3, done=3, failed=2)
    counted.save(job.path)
    assert repr(shown) == f"<Job {job.id} done-with-errors: 3 rows, 2 failed>"
    replace(counted, state="done", total=1, done=1, failed=0).save(job.path)
    assert repr(shown) == f"<Job {job.id} done: 1 row>"
    for name in ("state.json", "journal.db"):
        (job.path / name).write_bytes(b"x")
    assert repr(shown) == f"<Job {job.id} damaged>"
    assert "damaged" in shown._repr_html_()
    job.path.rename(job.path.with_name("gone"))
    assert repr(shown) == f"<Job {job.id} removed>"
    assert "removed" in shown._repr_html_()


def test_what_a_notebook_shows_of_a_job_is_text_and_no_markup(job: JobFolder) -> None:
    job.set_state("failed", "<script>alert(1)</script>\x1b[2J", "do & see")
    hostile = JobFolder(job.path.rename(job.path.with_name("<img src=x onerror=y>")))
    shown = Job(hostile)._repr_html_()
    assert "<img" not in shown
    assert "<script" not in shown
    assert "<b>tiny" not in shown
    assert "&lt;img src=x onerror=y&gt;" in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J<br>do &amp; see" in shown
    assert "a&amp;b.jsonl" in shown
    assert "color" not in shown
    assert repr(Job(hostile)).startswith("<Job <img src=x onerror=y> failed")


def test_numbers_and_booleans_with_gaps_stay_what_they_are() -> None:
    big = 2**53 + 1
    table = pa.table(
        {
            "whole": pa.array([1, 2, 3]),
            "gaps": pa.array([big, None, 3]),
            "small": pa.array([1, None, 3], pa.uint8()),
            "flag": pa.array([True, None, False]),
            "text": ["a", None, "c"],
            "list": [[1], None, [2, 3]],
            "share": [0.5, None, 1.0],
        }
    )
    frame = pandas_of(table)
    assert list(frame.index) == [0, 1, 2]
    assert [str(frame[name].dtype) for name in ("whole", "gaps", "small", "flag", "share")] == [
        *("int64", "Int64", "UInt8", "boolean", "float64")
    ]
    assert frame["gaps"].tolist() == [big, pd.NA, 3]
    assert frame["text"].isna().tolist() == [False, True, False]
    assert frame["list"].tolist() == [[1], None, [2, 3]]
    nested = pa.table(
        {
            "list": [[big, None], [1]],
            "struct": [{"x": big}, {"x": None}],
            "both": [[{"x": None}], [{"x": big}]],
        }
    )
    assert pandas_of(nested).to_dict("records") == nested.to_pylist()
    assert polars_of(table).to_dicts() == table.to_pylist()
    assert isinstance(polars_of(table), pl.DataFrame)
    own = pd.DataFrame({"n": pd.array([big, None], "Int64")}, index=pd.Index(["x", "y"], name="k"))
    back = pandas_of(pa.Table.from_pandas(own).append_column("new", pa.array([None, 4])))
    assert list(back.index) == ["x", "y"]
    assert back["n"].tolist() == [big, pd.NA]
    assert back["new"].tolist() == [pd.NA, 4]


@pytest.mark.parametrize(("name", "make"), [("pandas", pandas_of), ("polars", polars_of)])
def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, make: Any
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MachineError, match=name) as missing:
        make(pa.table({"a": [1]}))
    assert missing.value.hint == f"pip install {name}"


def test_a_bar_is_drawn_where_somebody_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    assert not watched()
    with Bar(None, "generating") as bar:
        bar.show("generating", 4, 2, 0)
    with Bar(True, "generating", delay=1e6) as bar:
        bar.show("generating", 4, 2, 0)
    assert capsys.readouterr().err == ""
    with Bar(True, "waiting") as bar:
        bar.show("running\x1b", 4, 2, 1)
        bar.end("done", 4, 4, 1)
    assert set(threading.enumerate()) <= before
    last = capsys.readouterr().err.rsplit("\r", 1)[1]
    assert last.startswith("done: 100%|")
    assert "| 4/4 rows [" in last
    assert ", 1 failed]" in last


def test_a_traceback_shows_the_hint_once(tmp_path: Path) -> None:
    error = UserError("no room", "make room")
    assert traceback.format_exception_only(error)[1:] == ["hint: make room\n"]
    error.add_note("also this")
    error.hint = "make more room"
    assert error._render_traceback_() == ["UserError: no room", "hint: make more room", "also this"]
    same = pickle.loads(pickle.dumps(sendable(error)))
    assert (str(same), same.hint, same.__notes__) == (str(error), error.hint, error.__notes__)
    error.hint = None
    assert error._render_traceback_() == ["UserError: no room", "also this"]
    option = OptionError("{stop} is \x1b[2J")
    assert option._render_traceback_() == [r"OptionError: stop is \x1b[2J"]


@pytest.fixture
def jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_cache: Path) -> Path:
    """Notebooks have this environment's kernel and nothing of this user's settings."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / "models").symlink_to(model_cache)
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("BATCHRUN_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def shape(notebook: Any) -> list[Any]:
    """What each cell shows: kinds of output, and of the last state of a bar its beginning."""
    return [
        [(out.output_type, sorted(out.get("data", {})), out.get("ename")) for out in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_example_notebook_runs(jupyter: Path, smollm2: object) -> None:
    committed = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(committed)
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")
    ran = nbformat.read(NOTEBOOK, 4)
    client = NotebookClient(ran, km=KernelManager(transport="ipc"), coalesce_streams=True)
    client.execute(cleanup_kc=True)  # else a kernel of ours would run on, its sockets open
    assert shape(ran) == shape(committed)
    frame = next(cell for cell in ran.cells if "to_pandas" in cell.source)
    assert "the field 'prompt' is null" in frame.outputs[0].data["text/plain"]


@contextmanager
def kernel() -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager = KernelManager(transport="ipc")
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=300)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_job_survives_the_kernel_that_submitted_it(jupyter: Path, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    rows = "[{'prompt': 'a'}, {'prompt': 'b'}]"
    options = f"model={str(model)!r}, device='cpu', max_tokens=4"
    with DeviceQueue(jupyter, "cpu"):  # the job waits for its turn as long as this is held
        with kernel() as (manager, client):
            asked = client.execute(f"import batchrun; batchrun.run({rows}, {options})")
            shown = ""
            while "starting" not in shown:
                shown += client.get_iopub_msg(timeout=300)["content"].get("text", "")
            manager.interrupt_kernel()
            reply: dict[str, Any] = {}
            while reply.get("parent_header", {}).get("msg_id") != asked:
                reply = client.get_shell_msg(timeout=300)
            told = "\n".join(reply["content"]["traceback"])
            assert reply["content"]["ename"] == "KeyboardInterrupt"
            assert "continues in a process of its own: wait() waits for it again" in told
        job = Job.find()
        assert job.state == "queued"
        assert held_by(jupyter / "jobs" / job.id)
    assert job.wait(600).state == "done"
