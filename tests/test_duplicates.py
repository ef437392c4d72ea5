"""Equal rows under greedy decoding: computed once, and every row gets its own answer."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.core import Completion, FinishReason, Request, SamplingParams
from batchrun.engine.model.generation import Generation
from batchrun.jobs import folder
from batchrun.jobs.errors import JournalError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import CopiedResult, DoneSet, Result
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.rows.source import open_source
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.stats import summarise
from batchrun.jobs.verify import verify
from batchrun.runner import duplicates, planner, writer
from batchrun.runner.duplicates import Duplicates
from batchrun.runner.job_run import Outcome, run_job
from batchrun.runner.live import Progress
from batchrun.runner.planner import Waiting
from batchrun.runner.reader import Reader

GREEDY = SamplingParams(max_tokens=5)


def asked(row: int, ids: tuple[int, ...] = (1, 2), params: SamplingParams = GREEDY) -> Request:
    return Request(row, 0, ids, params, 0)


def claim(known: Duplicates, request: Request) -> CopiedResult | bool:
    return known.claim(Waiting.of(request))


def answer(row: int, status: str = "ok") -> Result:
    return Result(row, 0, status, "text", (7, 8), "stop", 2, 2, None, None, 1.0, 2.0, 3.0, -0.5)


def test_a_repetition_of_a_waiting_row_gets_its_result() -> None:
    known = Duplicates(1)
    assert claim(known, asked(4)) is True
    assert [claim(known, asked(row)) for row in (5, 9)] == [False, False]
    first, second = known.settle(asked(4), answer(4))
    assert first == answer(5)._replace(queue_s=None, prefill_s=None, decode_s=None)
    assert second.row == 9
    assert (known.rows, known.tokens) == (2, 4)
    assert known.settle(asked(4), answer(4)) == []


def test_a_repetition_of_a_finished_row_is_copied() -> None:
    known = Duplicates(3)
    assert claim(known, asked(4)) is True
    assert known.settle(asked(4), answer(4)) == []
    assert claim(known, replace(asked(7), sample=2)) == CopiedResult(7, 2, 4, 0, 2)
    assert (known.rows, known.tokens) == (1, 2)


def test_the_repetitions_of_a_failed_row_fail_and_later_ones_are_computed() -> None:
    known = Duplicates(1)
    claim(known, asked(4))
    claim(known, asked(5))
    [copy] = known.settle(asked(4), answer(4, "error"))
    assert (copy.row, copy.status) == (5, "error")
    assert claim(known, asked(6)) is True


@pytest.mark.parametrize(
    "other",
    [
        asked(1, (1, 3)),
        asked(1, (1, 2, 0)),
        asked(1, params=SamplingParams(max_tokens=6)),
        asked(1, params=SamplingParams(max_tokens=5, num_beams=2)),
        asked(1, params=SamplingParams(max_tokens=5, stop=("x",))),
    ],
)
def test_what_asks_something_else_is_computed(other: Request) -> None:
    known = Duplicates(1)
    assert claim(known, asked(0)) is True
    assert claim(known, other) is True


def test_draws_are_never_shared_and_seeds_of_greedy_rows_do_not_matter() -> None:
    known = Duplicates(1)
    drawn = SamplingParams(max_tokens=5, temperature=0.5)
    assert [claim(known, asked(row, params=drawn)) for row in range(3)] == [True] * 3
    assert known.settle(asked(0, params=drawn), answer(0)) == []
    seeded = [SamplingParams(max_tokens=5, seed=seed) for seed in (1, 2)]
    assert [claim(known, asked(row, params=p)) for row, p in enumerate(seeded)] == [True, False]


def test_no_more_than_so_many_are_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_ATTACHED", 2)
    known = Duplicates(1)
    assert [claim(known, asked(row)) for row in range(5)] == [True, False, False, True, True]
    assert known.settle(asked(3), answer(3)) == []  # one that is computed beside the first
    assert [r.row for r in known.settle(asked(0), answer(0))] == [1, 2]
    assert claim(known, asked(9)) == CopiedResult(9, 0, 0, 0, 2)


def test_a_full_table_forgets_and_never_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_SETS", 4)
    known = Duplicates(1)
    for row in range(1000):
        request = asked(row, (row,))
        assert claim(known, request) is True
        known.settle(request, answer(row))
    found = [claim(known, asked(1000 + row, (row,))) for row in range(1000)]
    copies = [(i, copy) for i, copy in enumerate(found) if isinstance(copy, CopiedResult)]
    assert len(copies) == 16
    assert all(copy[:4] == (1000 + i, 0, i, 0) for i, copy in copies)


def test_a_copy_of_nothing_is_refused(tmp_path: Path) -> None:
    Journal.create(tmp_path)
    with Journal(tmp_path, 1) as journal:
        journal.begin_run()
        journal.write([answer(0), answer(1, "error")])
        for of in (1, 2):  # an error, and none at all
            with pytest.raises(JournalError, match="to be copied is not in the journal"):
                journal.write([answer(5), CopiedResult(6, 0, of, 0, 2)])
        journal.write([CopiedResult(8, 0, 0, 0, 2), answer(7), CopiedResult(9, 0, 7, 0, 2)])
        found = list(journal.results())
        assert [result.row for result in found] == [0, 1, 7, 8, 9]
        assert found[3:] == [
            answer(row)._replace(queue_s=None, prefill_s=None, decode_s=None) for row in (8, 9)
        ]


class _Engine:
    """Answers with what was asked; ends rows in any order; some prompts fail."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._queue: list[Request] = []
        self.computed: list[tuple[int, int]] = []
        self.on_admit: Any = None

    @property
    def has_work(self) -> bool:
        return bool(self._queue)

    def load(self) -> tuple[int, int, int]:
        return len(self._queue), 0, 0

    def progress(self) -> list[tuple[int, int]]:
        return []

    def add(self, request: Request) -> None:
        self._queue.append(request)

    def partials(self) -> list[Request]:
        return [replace(r, generated_ids=(1,)) for r in self._queue]

    def step(self) -> list[Completion]:
        if self._rng.random() < 0.5:
            return []
        request = self._queue.pop(self._rng.randrange(len(self._queue)))
        self.computed.append((request.row, request.sample))
        if request.prompt_ids[0] == ord("!"):
            return [Completion(request, (), None, FinishReason.ERROR, "kv_budget", "refused")]
        return [Completion(request, (len(self.computed),), said(request))]


def said(request: Request) -> str:
    """What is to be answered: the same to the same question, and else never the same."""
    params = request.params
    drawn = "" if params.greedy else f" drawn for {request.row}.{request.sample}"
    return f"{bytes(request.prompt_ids).decode()} within {params.max_tokens}{drawn}"


@dataclass
class _Workbench:
    engine: _Engine

    generation = Generation()
    max_num_seqs = 4
    max_num_batched_tokens = 64

    def encode(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(fields["prompt"].encode())

    def recall(self, answers: Any, constraint: Any) -> None:
        pass

    def measurements(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def make_job(home: Path, rows: list[tuple[str, int, float]], *, n: int, keep: int | None) -> Any:
    texts, limits, temperatures = zip(*rows, strict=True)
    table = {"prompt": texts, "max_tokens": limits, "temperature": temperatures}
    path = home / "in.parquet"
    pq.write_table(pa.table({k: list(v) for k, v in table.items()}), path)
    spec = JobSpec(
        inputs=(InputFile.of(path),),
        input_format="parquet",
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(name="none"),
        sampling=SamplingSpec(),
        n=n,
        keep=keep,
        output=OutputSpec(path=str(home / "out.parquet"), format="parquet"),
    )
    return folder.create(home, spec)


def run(job: JobFolder, rng: random.Random, stop_at: int | None) -> tuple[Outcome, _Engine]:
    engine, stop = _Engine(rng), threading.Event()
    begun = job.counts().rows

    def watch(progress: Progress) -> None:
        if stop_at is not None and len(engine.computed) >= stop_at:
            stop.set()

    bench = _Workbench(engine)
    outcome = run_job(job.path, stop=stop, on_progress=watch, open_workbench=lambda *_: bench)
    assert job.counts().rows >= begun
    return outcome, engine


class _Sink:
    full = False

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)

    def close(self) -> None:
        pass


def test_what_a_row_was_is_noted_before_another_ones_end_can_answer_it(tmp_path: Path) -> None:
    """From the instant on at which it is attached, its result may be journalled."""
    job = make_job(tmp_path, [("a", 3, 0.0)] * 5, n=1, keep=None)
    spec, requests, results = job.spec(), _Sink(), _Sink()
    source = open_source(spec.parts, spec.input_format)
    bench = _Workbench(_Engine(random.Random(1)))
    reader = Reader(spec, source, DoneSet(1), bench, lambda _: None)
    claim, attached = reader.duplicates.claim, []

    def claimed(waiting: Waiting, before: Callable[[], None]) -> CopiedResult | bool:
        found = claim(waiting, before)
        if found is False:
            noted = {row for item in results.items for row, _ in item.digests}
            assert waiting.rest.row in noted
            attached.append(waiting.rest.row)
        return found

    reader.duplicates.claim = claimed  # type: ignore[method-assign]
    reader.read(requests, results)
    assert attached == [1, 2, 3, 4]


def proven(write: Callable[..., None]) -> Callable[..., None]:
    """After each commit, where a kill may come, the rows of all results are known."""

    def checked(journal: Journal, *args: Any, **kwargs: Any) -> None:
        write(journal, *args, **kwargs)
        rows = {result.row for result in journal.results()}
        assert rows <= journal.digests(0, max(rows, default=0) + 1).keys()

    return checked


some_rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "!d", "ee"]),
        st.sampled_from([3, 4]),
        st.sampled_from([0.0, 0.0, 0.0, 1.0]),
    ),
    min_size=1,
    max_size=60,
)


@given(
    some_rows,
    st.integers(0, 2**32),
    st.sampled_from([(1, None), (3, None), (3, 2)]),
    st.lists(st.integers(0, 12), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_row_has_its_own_answer(
    rows: list[tuple[str, int, float]],
    seed: int,
    samples: tuple[int, int | None],
    stops: list[int],
) -> None:
    """Whatever repeats, fails, and is interrupted; and nothing is computed twice in one run."""
    n, keep = samples
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHRUN_HOME", name)
        patch.setattr(writer, "_COMMIT_SECONDS", rng.choice([0.0, 0.5]))
        patch.setattr(duplicates, "_SETS", 4)
        patch.setattr(Journal, "write", proven(Journal.write))
        patch.setattr(planner, "_FIRST", rng.choice([2, 7, 512]))
        job = make_job(Path(name), rows, n=n, keep=keep)
        for stop_at in (*stops, None):
            outcome, engine = run(job, rng, stop_at)
            assert len(set(engine.computed)) == len(engine.computed)
        failed = any(text.startswith("!") for text, _, _ in rows)
        assert outcome is (Outcome.DONE_WITH_ERRORS if failed else Outcome.DONE)
        with job.journal() as journal:
            found = list(journal.results())
            journal.check()
        assert len(found) == len(rows) * n
        for i, result in enumerate(found):
            row, sample = divmod(i, n)
            text, limit, temperature = rows[row]
            assert (result.row, result.sample) == (row, sample)
            params = SamplingParams(max_tokens=limit, temperature=temperature)
            bad = text.startswith("!")
            assert result.status == ("error" if bad else "ok")
            if not bad:
                assert result.text == said(Request(row, sample, tuple(text.encode()), params, 0))
        assert verify(job) == []
        failures = sum(text.startswith("!") for text, _, _ in rows) * n
        if not stops:  # all of it is of one run
            same = summarise(job)["duplicates"]["rows"]
            assert 0 <= len(found) - len(engine.computed) - same <= failures  # failed with others
            # A failed one may be tried anew where it comes up again after its failure.
            least = len({row[:2] for row in rows if not row[2]}) + n * sum(r[2] > 0 for r in rows)
            assert len(engine.computed) == least or failures
            assert len(engine.computed) >= least
        assert job.retry_failed() == failures
