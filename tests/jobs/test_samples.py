"""A run's figures over time: as many as can be drawn, however long it takes."""

from itertools import pairwise

import pytest

from batchrun.jobs.errors import Fenced, JournalError
from batchrun.jobs.journal import samples
from batchrun.jobs.journal.journal import Journal
from batchrun.jobs.journal.results import Result
from batchrun.jobs.metrics import METRICS, SAMPLED, recorded


@pytest.fixture
def folder(tmp_path):
    Journal.create(tmp_path)
    return tmp_path


def seconds(journal, run):
    return [sample["wall_s"] for sample in journal.samples(run)]


def test_a_sample_has_the_figures_that_the_table_says(folder):
    figures = recorded({"wall_s": 1.5, "running": 3, "kv_mapped": 4096, "steps": 7})
    with Journal(folder, 1) as journal:
        run = journal.begin_run()
        journal.write([], figures)
        [sample] = journal.samples(run)
        journal.check()
    assert tuple(sample) == SAMPLED == tuple(m.name for m in METRICS if m.sampled)
    assert sample == {name: figures[name] for name in SAMPLED}
    assert (sample["running"], sample["kv_mapped"], sample["steps"]) == (3, 4096, 7)


def test_samples_are_a_few_seconds_apart_and_of_their_own_run(folder):
    with Journal(folder, 1) as journal:
        first = journal.begin_run()
        for tenth in range(100):
            journal.write([], {"wall_s": tenth / 10})
        second = journal.begin_run()
        journal.write([], {"wall_s": 0.5})
        journal.write([])  # says nothing of figures
        assert seconds(journal, first) == [0.0, 2.0, 4.0, 6.0, 8.0]
        assert seconds(journal, second) == [0.5]
        assert seconds(journal, 9) == []


def test_a_long_run_keeps_as_many_as_a_short_one_evenly_spread(folder, monkeypatch):
    monkeypatch.setattr(samples, "MOST", 20)
    with Journal(folder, 1) as journal:
        run = journal.begin_run()
        for count in range(1000):
            journal.write([], {"wall_s": 2.0 * count})
            assert len(journal.samples(run)) <= 20
        kept = seconds(journal, run)
        journal.check()
    assert len(kept) >= 10
    assert kept[0] == 0.0
    assert kept[-1] >= 1998.0 - (kept[1] - kept[0])
    assert {b - a for a, b in pairwise(kept)} == {kept[1]}


def test_thinning_leaves_other_runs_alone(folder, monkeypatch):
    monkeypatch.setattr(samples, "MOST", 4)
    with Journal(folder, 1) as journal:
        first = journal.begin_run()
        for count in range(4):
            journal.write([], {"wall_s": 2.0 * count})
        second = journal.begin_run()
        for count in range(9):
            journal.write([], {"wall_s": 2.0 * count})
        assert seconds(journal, first) == [0.0, 2.0, 4.0, 6.0]
        assert seconds(journal, second) == [0.0, 8.0, 16.0]


def test_a_sample_is_in_the_transaction_of_the_results(folder):
    """No transaction of its own, and none of it is there where the write fails."""
    with Journal(folder, 1) as journal:
        run = journal.begin_run()
        statements = []
        journal._db.set_trace_callback(statements.append)
        journal.write([Result(0, 0, "ok")], {"wall_s": 1.0})
        journal._db.set_trace_callback(None)
        assert sum(statement == "COMMIT" for statement in statements) == 1
        assert any(statement.startswith("INSERT INTO samples") for statement in statements)
        with pytest.raises(JournalError):
            journal.write([Result(0, 0, "ok")], {"wall_s": 9.0})
        assert seconds(journal, run) == [1.0]
        with Journal(folder, 1) as other:
            other.begin_run()
            with pytest.raises(Fenced):
                journal.write([], {"wall_s": 20.0})
            assert seconds(other, run) == [1.0]
