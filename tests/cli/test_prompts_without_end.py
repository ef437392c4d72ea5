"""Whatever making a prompt or reading a file does to a run, other rows get their answers."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.folder import list_jobs
from tests.cli.conftest import CommandLine
from tests.cli.test_async import trapped

PROMPTS = [f"prompt {i}" for i in range(30)]
ABORT = "os.abort()"


def in_prompt(what: str, row: int = 7) -> str:
    """A trap that does something as the prompt of a row is made."""
    return (
        "from batchrun.engine.text import PromptBuilder\n"
        "call = PromptBuilder.__call__\n"
        "def trapped(self, fields):\n"
        f"    if fields['prompt'] == 'prompt {row}':\n"
        f"        {what}\n"
        "    return call(self, fields)\n"
        "PromptBuilder.__call__ = trapped"
    )


def test_a_prompt_that_brings_the_process_down_is_not_made_a_third_time(
    batchrun: CommandLine,
) -> None:
    done = trapped(batchrun, in_prompt(ABORT))
    assert done.returncode == 3, done.stderr
    rows = batchrun.read("out.jsonl")
    assert [i for i, row in enumerate(rows) if row["error"]] == [7]
    assert "crashed 2 times" in rows[7]["error"]
    assert len(rows) == 30
    [job] = list_jobs(batchrun.home)
    with job.journal() as journal:
        assert journal.crash_counts() == {7: 2}, "innocent rows were blamed"


@pytest.mark.parametrize("first", [0, 16])
def test_a_file_that_brings_the_process_down_is_named_and_no_row_is_blamed(
    batchrun: CommandLine, first: int
) -> None:
    trap = (
        "import jobs.parquet\n"
        "batches = jobs.parquet._batches\n"
        "def trapped(file, group, *arguments):\n"
        f"    if 8 * group == {first}:\n"
        "        os.abort()\n"
        "    return batches(file, group, *arguments)\n"
        "jobs.parquet._batches = trapped"
    )
    path = batchrun.folder / "in.parquet"
    pq.write_table(pa.table({"prompt": PROMPTS}), path, row_group_size=8)
    done = trapped(batchrun, trap, source=path)
    assert done.returncode == 1, done.stderr
    said = f"the run crashed with SIGABRT while it read {path}, rows {first} to {first + 7}"
    assert f"error: {said}: the file is damaged" in done.stderr
    [job] = list_jobs(batchrun.home)
    assert job.state() == "failed"
    with job.journal() as journal:
        assert journal.crash_counts() == {}
    assert batchrun("resume", job.id).code == 0  # without the trap
    assert len(batchrun.read("out.jsonl")) == 30
