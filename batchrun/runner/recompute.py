"""Computes finished rows of a job again, each alone, and compares them with what the job kept."""

from __future__ import annotations

import time
from bisect import bisect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from heapq import nsmallest
from typing import Any, cast

from batchrun import machine
from batchrun.fleet.devices import one_engine
from batchrun.jobs.determinism import computing_runs, why_not
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import check_unchanged
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result, Scores, packed, unpacked
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import JobSpec
from batchrun.models.resolve import fingerprint
from batchrun.runner.drive import Drive
from batchrun.runner.live import Progress
from batchrun.runner.opening import open_runtime
from batchrun.runner.overdue import PromptLimit
from batchrun.runner.reader import Reader

_SHOWN = 40  # characters of an answer
_IN_ORDER = {
    "token_ids": "differs from token {:,} on",
    "logprobs": "has the same tokens, but different log-probabilities from token {:,} on",
    "scores": "has different scores of known text from number {:,} on",
    "text": "has the same tokens, but a different text from character {:,} on",
}
_COMPARED = ("prompt_tokens", *_IN_ORDER, "finish_reason", "completion_tokens", "logprob")


@dataclass(frozen=True)
class Recomputed:
    """What came out.

    Args:
        rows: How many rows were computed again.
        differences: By row, a line for each of its samples that differs.
        varies: Why rows may differ, in one clause; None if they must not.
    """

    rows: int
    differences: dict[int, list[str]]
    varies: str | None


def recompute(
    job: JobFolder,
    most: int,
    seed: int,
    limit: PromptLimit,
    *,
    log: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Recomputed:
    """Compute some finished rows of a job again, and compare. Changes nothing of the job.

    Each sample has the engine to itself: it shares no step and no memory with another, and has no
    draft tokens. Rows that failed or were skipped are never among them.

    Args:
        job: The job, finished or not.
        most: How many rows; all finished ones if there are fewer.
        seed: Which rows: their place in a shuffled order depends on it and their numbers alone.
        limit: How long a row's prompt may take.
        log: Called with each line that the user should see.
        on_progress: Called after each row.

    Raises:
        JobError: The job, its inputs or its model are not what they were.
        ModelError: The model can't be loaded.
        EngineError: This machine can't compute the job.
    """
    check_unchanged(job, fingerprint)
    with job.journal() as journal:
        rows = chosen(journal, most, seed)
        if not rows:
            return Recomputed(0, {}, None)
        spec = job.spec()
        found, here = _computed(spec, journal, rows, limit, log=log, on_progress=on_progress)
        differences = {
            row: lines
            for row in rows
            if (lines := [*_differing(journal.results(range(row, row + 1)), found, spec.n)])
        }
        runs = [*computing_runs(journal), {"id": "this one", "stats": here}]
    return Recomputed(len(rows), differences, why_not(runs))


def chosen(journal: Journal, most: int, seed: int) -> list[int]:
    """The numbers of up to so many rows that have all their answers, in order."""

    def place(row: int) -> bytes:
        return blake2b(f"{seed} {row}".encode(), digest_size=8).digest()

    return sorted(nsmallest(most, journal.whole_rows(), key=place))


def difference(was: Result, now: Result) -> str | None:
    """The first thing in which an answer computed again is not the one in the journal, or None.

    Tokens and characters are counted from 0.
    """
    if now.status != "ok":
        return f"can't be recomputed: {now.error or now.status}"
    scores = now.scores and Scores.unpacked(now.scores.packed())
    now = now._replace(logprobs=unpacked(packed(now.logprobs)), scores=scores)
    name = next((n for n in _COMPARED if getattr(was, n) != getattr(now, n)), None)
    if name is None:
        return None
    old, new = getattr(was, name), getattr(now, name)
    if name in _IN_ORDER:
        at = _common(old or (), new or ()) if name != "scores" else _common(*_numbers(was, now))
        old, new = _parts(was, now, name, at)
        return f"{_IN_ORDER[name].format(at)}: {old} in the job, {new} when recomputed"
    return f"differs in {name}: {old} in the job, {new} when recomputed"


def _common(some: Sequence[object], others: Sequence[object]) -> int:
    """The length of the common beginning of two sequences."""
    pairs = enumerate(zip(some, others, strict=False))
    most = min(len(some), len(others))
    return next((i for i, (one, other) in pairs if one != other), most)


def _parts(was: Result, now: Result, name: str, at: int) -> list[str]:
    """Two answers from a token or character on."""
    both = was, now
    if name == "scores":
        return [f"{found[at]:.9g}" if at < len(found) else "none" for found in _numbers(*both)]
    if name == "logprobs":
        each = [_logprobs(result, at) for result in both]
        differ = _common(*each)
        return [", ".join(found[differ : differ + 1]) or "none" for found in each]
    char = _common(was.text or "", now.text or "")
    texts = [repr((result.text or "")[char : char + _SHOWN]) for result in both]
    if name == "text":
        return texts
    return [
        f"{result.token_ids[at]} {text}" if at < len(result.token_ids) else "nothing more"
        for result, text in zip(both, texts, strict=True)
    ]


def _numbers(*results: Result) -> list[tuple[float, ...]]:
    """Each one's scores, those of labels first."""
    scores = (result.scores or Scores() for result in results)
    return [each.labels + each.logprobs for each in scores]


def _logprobs(result: Result, at: int) -> list[str]:
    """Those of a token and of the likeliest in its place; float32 has at most 9 digits."""
    if not result.logprobs:
        return []
    own, likeliest = result.logprobs[at]
    return [f"{own:.9g}", *(f"{logprob:.9g} for {token}" for token, logprob in likeliest)]


def _differing(
    kept: Iterable[Result], computed: Mapping[tuple[int, int], Result], n: int
) -> Iterator[str]:
    """A line for each of a row's samples that differs."""
    for was in kept:
        found = difference(was, computed[was.row, was.sample])
        if found is not None:
            yield f"row {was.row:,}{f', sample {was.sample}' * (n > 1)} {found}"


class _AllBut(Container[tuple[int, int]]):
    """The samples of all rows but these, as a `DoneSet` would have them."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._rows = frozenset(rows)

    def __contains__(self, key: object) -> bool:
        row, _ = cast("tuple[int, int]", key)
        return row not in self._rows


def _computed(
    spec: JobSpec,
    journal: Journal,
    rows: Sequence[int],
    limit: PromptLimit,
    *,
    log: Callable[[str], None],
    on_progress: Callable[[Progress], None],
) -> tuple[Mapping[tuple[int, int], Result], Mapping[str, Any]]:
    """The results of these rows by row and sample, and the engine's figures."""
    began = time.perf_counter()

    def report(phase: str, done: int, tokens: int) -> None:
        elapsed = time.perf_counter() - began
        on_progress(Progress(len(rows), done, 0, 0, tokens, 1, 0, elapsed, phase))

    report("load", 0, 0)
    if (note := machine.use_cores()) is not None:
        log(note)
    runtime, _ = one_engine(spec.runtime)
    alone = replace(runtime, reorder=False, share_prefixes=False, drafts=False)
    spec = replace(spec, limit=rows[-1] + 1, runtime=alone)
    source = open_source(spec.parts, spec.input_format, noted=limit.note.reading)
    with open_runtime(spec, log) as bench:

        def ended(result: Result) -> None:
            if result.sample == spec.n - 1:
                report("run", bisect(rows, result.row), bench.engine.load()[2])

        reader = Reader(
            *(spec, source, _AllBut(rows), bench),
            lambda _: None,  # the job said it
            digests=journal.digests,
            limit=limit,
        )
        report("run", 0, 0)
        drive = Drive(bench.engine, reader, alone=True, ended=ended)
        reader.read(drive, drive)
        return drive.results, bench.measurements()
