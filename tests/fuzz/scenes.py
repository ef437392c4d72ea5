"""Job folders in which one file is damaged: what all commands make of them is right or named.

A scene is a folder as a run left it: *done*, *stopped* by its user with its input moved, or
*killed*, with a log that was not moved into the database. Its input and output lie in it, so that
it can be anywhere. What the engine says follows from row and position: a job has one right output.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from batchrun.jobs.errors import JobError
from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.folder import JobFolder, create, list_jobs
from batchrun.jobs.identity import PLACES, set_limits
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.destination import check_apart, resuming
from batchrun.jobs.output.rejoin import export_job
from batchrun.jobs.same import find_same
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import STATS, summarise
from batchrun.jobs.verify import verify
from batchrun.runner import engine_loop, job_run, writer
from batchrun.runner.job_run import Outcome
from batchrun.runner.live import LogTail, Progress, Reporter, read_progress
from tests.faults.smalljob import Ledger, NullEngine, NullWorkbench, length, token
from tests.fuzz.trial import Wrong

ROWS = 24
_MOVED, _OUTPUT = "moved.jsonl", "output.jsonl"
_PROMPTS = [*(f"row {row}" for row in range(ROWS - 1)), None]
Files = dict[str, bytes]


def _answer(row: int) -> tuple[str | None, list[int], str | None]:
    if _PROMPTS[row] is None:
        return None, [], "the row has no prompt"
    tokens = [token(row, 0, position) for position in range(length(row))]
    return " ".join(map(str, tokens)), tokens, None


@cache
def scenes() -> dict[str, Files]:
    """The files of each scene; made once a process."""
    return {"done": _made(), "stopped": _made(stop=True), "killed": _made(kill=True)}


def _made(*, stop: bool = False, kill: bool = False) -> Files:
    killed: Files = {}
    stopping = threading.Event()
    with tempfile.TemporaryDirectory() as root:
        job = _submitted(Path(root))

        def acknowledged(count: int) -> None:
            if count >= ROWS // 2 and stop:
                stopping.set()
            if count >= ROWS // 2 and kill and not killed:
                killed.update(_files(job.path))

        _run(job, stopping, acknowledged)
        if stop:
            with job.journal(readonly=False) as journal:
                journal.count_crash([ROWS - 2])
            job.set_state("interrupted", "somebody stopped it", "go on")
            path = Path(job.spec().inputs[0].path)
            write_json(job.path / PLACES, {path.name: _MOVED})
            set_limits(job.path, {"max_num_seqs": 3})
            path.rename(job.path / _MOVED)
        with Reporter(job.path) as reporter:
            reporter.update(Progress(ROWS, 3, 0, 0, 17, 2, 1, 0.5, "run"))
            reporter.message("a line of the log")
        return killed or _files(job.path)


def _submitted(root: Path) -> JobFolder:
    own = root / "rows.jsonl"
    rows = [json.dumps({"prompt": prompt, "id": i}) for i, prompt in enumerate(_PROMPTS)]
    own.write_text("\n".join(rows) + "\n")
    spec = JobSpec(
        inputs=(InputFile.of(own),),
        input_format="jsonl",
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(name="null", path="", fingerprint="", dtype="float32"),
        sampling=SamplingSpec(max_tokens=6),
        output=OutputSpec(path=_OUTPUT, format="jsonl", token_ids=True),
    )
    return create(root, spec, own)


def _run(
    job: JobFolder,
    stop: threading.Event | None = None,
    acknowledged: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Run the job: two results in a transaction, and what is in flight noted after each step."""
    write, count = Journal.write, 0
    patched = (writer.COMMIT_RESULTS, engine_loop._CHECKPOINT_SECONDS)

    def noting(journal: Journal, results: list[Any], *rest: Any, **more: Any) -> None:
        nonlocal count
        write(journal, results, *rest, **more)
        count += len(results)
        acknowledged(count)

    ledger = Ledger(ROWS)
    writer.COMMIT_RESULTS, engine_loop._CHECKPOINT_SECONDS = 2, 0.0
    Journal.write = noting  # type: ignore[method-assign, assignment]
    try:
        return job_run.run_job(
            job.path,
            stop=stop or threading.Event(),
            open_workbench=lambda spec, log: NullWorkbench(NullEngine(ledger)),
        )
    finally:
        Journal.write = write  # type: ignore[method-assign]
        writer.COMMIT_RESULTS, engine_loop._CHECKPOINT_SECONDS = patched
        ledger.close()


def _files(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith("-shm")}


# --- a folder with one damaged file --------------------------------------------------------------


def looked_at(scene: str, file: str, data: bytes, scratch: Path) -> str:
    """Do with the job what commands do.

    Raises:
        Wrong: Something else came of it than without the damage, and nobody said so.
        JobError: The damage was named, and nothing wrong came of it.
    """
    folder = scratch / "jobs" / "job"
    folder.mkdir(parents=True)
    for name, content in scenes()[scene].items():
        (folder / name).write_bytes(data if name == file else content)
    job = JobFolder(folder)
    problems = _named(lambda: verify(job)) or []
    if not problems:
        _check_content(job, scene, rolled_back=file.endswith("-wal"))
    _look(job, scratch)
    _check_exports(job, scratch, sound=not problems)
    (folder / _OUTPUT).unlink(missing_ok=True)  # a copy of it is somebody's own file
    try:
        with resuming(scratch, job):
            pass
        outcome = _run(job)
    except JobError as error:
        if not problems:
            raise Wrong(f"verify says it is sound, and resume: {error}") from error
        raise
    if outcome is not Outcome.DONE_WITH_ERRORS:
        raise Wrong(f"resumed, it is {outcome}")
    _check_rows((folder / _OUTPUT).read_text(), range(ROWS), "resumed")
    left = verify(job)
    if left:
        raise Wrong(f"resumed, it is not sound: {left}")
    if problems:
        raise JobError(problems[0])
    return "sound"


def _named(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except JobError as error:
        if not str(error).strip():
            raise Wrong("an error says nothing") from error
        return None


def _look(job: JobFolder, home: Path) -> None:
    """What is looked at without proof fails by name or not at all, and hides no other job."""
    if [found.id for found in list_jobs(home)] != [job.id]:
        raise Wrong("the job is not listed")
    for act in (job.snapshot, job.state, job.counts, job.failure, job.spec):
        _named(act)
    _named(lambda: json.dumps(summarise(job)))
    read_progress(job.path)
    for line in LogTail(job.path).lines():
        float(line["time"])
        str(line["message"]).encode()
    spec = JobSpec((), "jsonl", PromptSpec(), ModelSpec(), SamplingSpec())
    find_same(home, spec)
    check_apart(home, home / "other", [])


def _check_content(job: JobFolder, scene: str, *, rolled_back: bool) -> None:
    """What `verify` calls sound says what it said; a log may have lost what was written last."""
    with job.journal() as journal:
        results = list(journal.results())
        total, begun = journal.meta("rows_total"), journal.partials()
    for result in results:
        got = (result.text, list(result.token_ids), result.error)
        if got != _answer(result.row):
            raise Wrong(f"row {result.row} has the result {got}")
    for begun_row, _ in begun:
        if (
            list(begun[begun_row, 0].token_ids)
            != _answer(begun_row)[1][: len(begun[begun_row, 0].token_ids)]
        ):
            raise Wrong(f"row {begun_row} has begun with {begun[begun_row, 0]}")
    if rolled_back:
        return
    known = _known(scene)
    if (state := job.state()) != known["state"]:
        raise Wrong(f"its state is {state}, not {known['state']}")
    found = {"rows": [r.row for r in results], "total": total, "begun": len(begun)}
    for name, value in found.items():
        if value != known[name]:
            raise Wrong(f"{name}: {value}, not {known[name]}")
    if json.loads(json.dumps(asdict(job.spec()))) != known["spec"](job):
        raise Wrong(f"the specification is {job.spec()}")
    if (job.path / STATS).exists():
        rows = read_json(job.path / STATS)["rows"]
        if rows["done"] != known["done"]:
            raise Wrong(f"stats.json says {rows}")


@cache
def _known(scene: str) -> dict[str, Any]:
    """What the undamaged scene says."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "job")
        folder.mkdir()
        for name, content in scenes()[scene].items():
            (folder / name).write_bytes(content)
        job = JobFolder(folder)
        assert verify(job) == []
        with job.journal() as journal:
            rows = [result.row for result in journal.results()]
            total, begun = journal.meta("rows_total"), len(journal.partials())
        done = read_json(folder / STATS)["rows"]["done"] if (folder / STATS).exists() else None
        spec = asdict(job.spec())

        def here(other: JobFolder) -> Any:
            return json.loads(json.dumps(spec).replace(str(folder), str(other.path)))

        state = job.state()
        return {
            "rows": rows,
            "total": total,
            "begun": begun,
            "done": done,
            "spec": here,
            "state": state,
        }


def _check_exports(job: JobFolder, scratch: Path, *, sound: bool) -> None:
    for partial in (False, True):
        out = scratch / "export.jsonl"

        def write(partial: bool = partial, out: Path = out) -> Any:
            with job.journal() as journal:
                return export_job(job.spec(), journal, out, format="jsonl", partial=partial)

        found = _named(write)
        if found is not None:
            rows = None if partial else range(ROWS)
            _check_rows(out.read_text(), rows, "exported")
            out.unlink()
        elif partial and sound:
            raise Wrong("verify says it is sound, and it can't be exported")


def _check_rows(text: str, rows: range | None, what: str) -> None:
    """Each row is there once, in order, beside its own answer; with None some may be missing."""
    seen = []
    for line in text.splitlines():
        row = json.loads(line)
        index = row.get("row", row.get("id"))
        seen.append(index)
        got = (row["completion"], row["completion_token_ids"] or [], row["error"])
        if got != _answer(index):
            raise Wrong(f"row {index} is {what} with {got}")
        if row.get("prompt") != _PROMPTS[index] and "row" not in row:
            raise Wrong(f"row {index} is {what} beside {row.get('prompt')!r}")
    if seen != (sorted(set(seen)) if rows is None else list(rows)):
        raise Wrong(f"{what} are the rows {seen}")
