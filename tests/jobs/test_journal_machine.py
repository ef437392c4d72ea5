"""Any history of writes, crashes and duplicates leaves the journal equal to a dictionary."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batchrun.jobs.errors import JournalError
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result

ROWS = 40
EVERY = range(ROWS)

texts = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
seconds = st.none() | st.floats(0, 1e6)
row_digests = st.tuples(st.integers(0, ROWS - 1), st.integers(-(2**63), 2**63 - 1))
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)


@st.composite
def results(draw, n):
    status = draw(st.sampled_from(["ok", "error"]))
    return Result(
        row=draw(st.integers(0, ROWS - 1)),
        sample=draw(st.integers(0, n - 1)),
        status=status,
        text=draw(texts),
        token_ids=draw(tokens),
        finish_reason=draw(st.sampled_from([None, "stop", "length"])),
        prompt_tokens=draw(st.integers(0, 2**40)),
        completion_tokens=draw(st.integers(0, 2**40)),
        error=draw(texts),
        error_kind=draw(st.sampled_from([None, "input", "context"])),
        queue_s=draw(seconds),
        prefill_s=draw(seconds),
        decode_s=draw(seconds),
    )


class JournalMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="journal-"))
        self.journal = None

    @initialize(n=st.sampled_from([1, 2, 5]))
    def create(self, n):
        self.n = n
        self.model = {}
        self.digests = {}
        self.stats = []
        self.folder = self.root / "0"
        self.folder.mkdir()
        Journal.create(self.folder)
        self.open()

    def open(self):
        self.journal = Journal(self.folder, self.n)
        assert self.journal.begin_run() == len(self.stats) + 1
        self.stats.append({})

    @rule(data=st.data(), stats=st.none() | st.fixed_dictionaries({"steps": st.integers(0, 9)}))
    def write(self, data, stats):
        batch = data.draw(
            st.lists(results(self.n), max_size=6, unique_by=lambda r: (r.row, r.sample))
        )
        batch = [r for r in batch if (r.row, r.sample) not in self.model]
        digests = data.draw(st.lists(row_digests, max_size=3))
        self.journal.write(batch, stats, digests=digests)
        for row, digest in digests:  # the first one counts
            self.digests.setdefault(row, digest)
        self.model |= {(r.row, r.sample): r for r in batch}
        if stats is not None:
            self.stats[-1] = stats

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def write_duplicate(self, data):
        old = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        new = data.draw(results(self.n))
        duplicate = Result(old.row, old.sample, "ok", text="other")
        with pytest.raises(JournalError):
            self.journal.write(
                [new, duplicate], {"steps": -1}, digests=[(row, -1) for row in EVERY]
            )

    @rule()
    def crash(self):
        """The files as they are at this instant, without the writer's goodbye."""
        crashed = self.root / str(len(self.stats))
        shutil.copytree(self.folder, crashed)
        self.journal.close()
        self.folder = crashed
        self.open()

    @rule()
    def reopen(self):
        self.journal.close()
        self.open()

    @rule()
    def read_back(self):
        expected = [self.model[key] for key in sorted(self.model)]
        with Journal(self.folder, self.n, readonly=True) as reader:
            assert list(reader.results()) == expected

    @invariant()
    def agrees(self):
        if self.journal is None:
            return
        done = self.journal.done()
        every = {(row, sample) for row in range(ROWS) for sample in range(self.n)}
        assert {key for key in every if key in done} == set(self.model)
        counts = self.journal.counts()
        assert counts.samples == len(self.model)
        assert counts.failed == len({r.row for r in self.model.values() if r.status == "error"})
        assert counts.prompt_tokens == sum(r.prompt_tokens for r in self.model.values())
        whole = [row for row in range(ROWS) if all((row, s) in self.model for s in range(self.n))]
        assert counts.rows == len(whole)
        assert [run["stats"] for run in self.journal.runs()] == self.stats
        assert self.journal.digests(0, ROWS) == self.digests
        first, count = ROWS // 4, ROWS // 2
        within = {row: d for row, d in self.digests.items() if first <= row < first + count}
        assert self.journal.digests(first, count) == within

    def teardown(self):
        if self.journal is not None:
            self.journal.check()
            self.journal.close()
        shutil.rmtree(self.root)


def test_the_journal_agrees_with_a_dictionary_after_any_history():
    run_state_machine_as_test(
        JournalMachine,
        settings=settings(max_examples=25, stateful_step_count=15, deadline=None),
    )
