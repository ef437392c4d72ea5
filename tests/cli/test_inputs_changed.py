"""Inputs that change under a running job: what is right is kept, what is not is refused.

The answer to a row is the same in every job, so an undisturbed job over the same rows says what has
to be beside each of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import held_by
from tests.cli.conftest import CommandLine
from tests.cli.gate import Gate
from tests.cli.test_async import processes, running, until

ROWS = 800
PROMPTS = [f"prompt {i:04}" for i in range(ROWS)]
FILLER = "x" * 2000  # so many bytes that the reader is in the middle of the file
FAST = ("--max-tokens", 3, "--ignore-eos", "--max-num-seqs", 8, "--dtype", "float32")
FAST += ("--temperature", 1, "--no-reorder")
Rows = list[dict[str, Any]]


def write(batchrun: CommandLine, name: str, prompts: list[str]) -> Path:
    return batchrun.write(name, prompts, filler=[FILLER] * len(prompts))


def answers(batchrun: CommandLine, prompts: list[str]) -> list[str]:
    """What has to be beside each prompt, by row."""
    write(batchrun, "undisturbed.jsonl", prompts)
    shown = batchrun.submit("undisturbed.jsonl", *FAST, "-o", "undisturbed-out.jsonl")
    assert shown.code == 0, shown.err
    found = [row["completion"] for row in batchrun.read("undisturbed-out.jsonl")]
    assert len(set(found)) > ROWS // 2
    return found


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[str]:
    root = tmp_path_factory.mktemp("undisturbed")
    return answers(CommandLine(root, root / "home", tiny_model), PROMPTS)


@dataclass(frozen=True)
class Held:
    """A job whose engine stands still after some rows, and whose reader has not read all."""

    job: JobFolder
    source: Path
    gate: Gate

    def ends(self, batchrun: CommandLine) -> int:
        """Let it go on to its end."""
        self.gate.open()
        return batchrun("watch", self.job.id).code


@pytest.fixture
def held(batchrun: CommandLine, gate: Gate) -> Callable[[str], Held]:
    gate.close(30)

    def submitted(kind: str) -> Held:
        source = write(batchrun, f"in.{kind}", PROMPTS)
        shown = batchrun.submit(source, *FAST, "-o", "out.jsonl", "--detach")
        assert shown.code == 0, shown.err
        job = JobFolder(batchrun.home / "jobs" / shown.out.split()[0])
        running(job)
        with job.journal() as journal:
            assert 0 < len(journal.digests(0, ROWS)) < ROWS
        return Held(job, source, gate)

    return submitted


def paired(rows: Rows, want: list[str]) -> None:
    """Beside a prompt is its answer."""
    for row in rows:
        if row.get("prompt") is not None:
            assert row["completion"] == want[int(row["prompt"].split()[1])], row


def by_number(batchrun: CommandLine, job: JobFolder, want: list[str], count: int) -> Rows:
    """A partial export has each result once, by the number of its row."""
    shown = batchrun("export", job.id, "--partial", "-o", "left.jsonl", "--overwrite")
    assert shown.code == 0, shown.err
    assert "the input has changed" in shown.err
    rows = batchrun.read("left.jsonl")
    assert len(rows) == count
    assert [row["row"] for row in rows] == sorted({row["row"] for row in rows})
    assert all(row["completion"] == want[row["row"]] for row in rows)
    paired(rows, want)
    return rows


def refuses(batchrun: CommandLine, job: JobFolder, named: str) -> None:
    """Everything that would go on as if nothing had happened."""
    resumed = batchrun("resume", job.id)
    assert (resumed.code, named in resumed.error) == (1, True), resumed.err
    checked = batchrun("verify", job.id)
    assert (checked.code, named in checked.out + checked.err) == (1, True)
    if job.counts().rows == ROWS:
        shown = batchrun("export", job.id, "-o", "again.jsonl")
        assert shown.code == 1
        assert "batchrun export --partial" in shown.hint
        assert not (batchrun.folder / "again.jsonl").exists()


def whole_once_restored(batchrun: CommandLine, job: JobFolder, want: list[str]) -> None:
    resumed = batchrun("resume", job.id)
    assert resumed.code == 0, resumed.err
    rows = batchrun.read("out.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    paired(rows, want)
    assert batchrun("verify", job.id).code == 0


def replaced(source: Path, batchrun: CommandLine) -> None:
    """Another file under the same name, as editors save; the run reads the old one."""
    other = write(batchrun, f"other{source.suffix}", [*PROMPTS[:-2], *PROMPTS[:-3:-1]])
    os.replace(other, source)


def deleted(source: Path, batchrun: CommandLine) -> None:
    source.unlink()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (deleted, "parquet"),
        pytest.param(replaced, "jsonl", marks=pytest.mark.long),
        pytest.param(replaced, "parquet", marks=pytest.mark.long),
        pytest.param(deleted, "jsonl", marks=pytest.mark.long),
    ],
)
def test_an_input_that_is_not_there_any_more_keeps_no_answer(
    batchrun: CommandLine,
    held: Callable[[str], Held],
    kind: str,
    change: Callable[[Path, CommandLine], None],
    want: list[str],
) -> None:
    """The run reads on in the old file; in the end there is none to put answers beside."""
    standing = held(kind)
    job, source = standing.job, standing.source
    data = source.read_bytes()
    change(source, batchrun)
    assert standing.ends(batchrun) == 1
    assert (job.state(), job.counts().rows) == ("failed", ROWS)
    assert not (batchrun.folder / "out.jsonl").exists()
    assert job.failure() is not None
    refuses(batchrun, job, source.name)
    rows = by_number(batchrun, job, want, ROWS)
    known = [row["row"] for row in rows if row.get("prompt") is not None]
    assert known == (list(range(ROWS - 2)) if change is replaced else [])
    source.write_bytes(data)
    whole_once_restored(batchrun, job, want)


def test_rows_rewritten_before_they_were_read_are_those_that_were_computed(
    batchrun: CommandLine,
    held: Callable[[str], Held],
) -> None:
    """In place, behind where the reader is: the job has read nothing else, and says so."""
    standing = held("jsonl")
    job, source = standing.job, standing.source
    lines = source.read_bytes().splitlines(keepends=True)
    with source.open("r+b") as file:
        file.write(b"".join([*lines[:-2], lines[-1], lines[-2]]))
    assert standing.ends(batchrun) == 0
    rows = batchrun.read("out.jsonl")
    prompts = [*PROMPTS[:-2], PROMPTS[-1], PROMPTS[-2]]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["completion"] for row in rows] == answers(batchrun, prompts)
    checked = batchrun("verify", job.id)
    assert (checked.code, source.name in checked.out) == (1, True)  # not what was submitted
    assert batchrun("export", job.id, "-o", "again.jsonl").code == 0
    assert batchrun.read("again.jsonl") == rows


def test_rows_rewritten_after_they_were_read_keep_no_answer(
    batchrun: CommandLine, held: Callable[[str], Held], want: list[str]
) -> None:
    standing = held("jsonl")
    job, source = standing.job, standing.source
    data = source.read_bytes()
    lines = data.splitlines(keepends=True)
    with source.open("r+b") as file:
        file.write(b"".join([lines[1], lines[0], *lines[2:]]))
    assert standing.ends(batchrun) == 1
    assert "row 0 of the input is not the row that the job read" in job.failure()[0]
    refuses(batchrun, job, source.name)
    rows = by_number(batchrun, job, want, ROWS)
    assert [row["row"] for row in rows if row.get("prompt") is None] == [0, 1]
    source.write_bytes(data)
    whole_once_restored(batchrun, job, want)


def test_a_file_cut_short_while_it_is_read_ends_the_run_with_the_reason(
    batchrun: CommandLine, held: Callable[[str], Held], want: list[str]
) -> None:
    standing = held("jsonl")
    job, source = standing.job, standing.source
    data = source.read_bytes()
    lines = data.splitlines(keepends=True)
    with source.open("r+b") as file:
        file.truncate(len(b"".join(lines[: ROWS - 5])))
    assert standing.ends(batchrun) == 1
    assert f"the input ended before its {ROWS} rows were read" in job.failure()[0]
    assert job.counts().rows == ROWS - 5
    refuses(batchrun, job, source.name)
    shown = batchrun("export", job.id, "--partial", "-o", "left.jsonl")
    assert shown.code == 0
    rows = batchrun.read("left.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS[:-5]
    paired(rows, want)
    source.write_bytes(data)
    whole_once_restored(batchrun, job, want)


@pytest.mark.parametrize("newline", [True, pytest.param(False, marks=pytest.mark.long)])
def test_what_is_appended_to_an_input_is_no_part_of_the_job(
    batchrun: CommandLine, held: Callable[[str], Held], newline: bool, want: list[str]
) -> None:
    standing = held("jsonl")
    job, source = standing.job, standing.source
    line = json.dumps({"prompt": "one more", "filler": FILLER})
    with source.open("a") as file:
        file.write(f"{line}\n" * 40 if newline else line)
    assert standing.ends(batchrun) == 0
    rows = batchrun.read("out.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    paired(rows, want)
    assert batchrun("verify", job.id).code == 0
    assert batchrun("export", job.id, "-o", "again.jsonl").code == 0
    again = (batchrun.folder / "again.jsonl").read_bytes()
    assert again == (batchrun.folder / "out.jsonl").read_bytes()


def test_a_job_whose_rows_to_come_were_changed_is_not_resumed(
    batchrun: CommandLine, held: Callable[[str], Held], want: list[str]
) -> None:
    """What it has so far is beside its rows all the same; of a file that grew it goes on."""
    standing = held("jsonl")
    job, source = standing.job, standing.source
    _, run = processes(job)
    run.kill()
    until(lambda: held_by(job.path) is None, "the supervisor's end")
    standing.gate.open()
    done = job.counts().rows
    assert 0 < done < ROWS
    data = source.read_bytes()
    lines = data.splitlines(keepends=True)
    with source.open("r+b") as file:
        file.write(b"".join([*lines[:-2], lines[-1], lines[-2]]))
    refuses(batchrun, job, source.name)
    assert batchrun("export", job.id, "--partial", "-o", "left.jsonl").code == 0
    rows = batchrun.read("left.jsonl")
    assert (len(rows), {"row"} & rows[0].keys()) == (done, set())
    assert all(row["prompt"] is not None for row in rows)
    paired(rows, want)
    source.write_bytes(data + lines[0])
    whole_once_restored(batchrun, job, want)
