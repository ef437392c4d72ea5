"""What a journal says of all results together."""

from batchrun.jobs.journal.results import Result
from tests.report.pages import answer, failure


def write(job, results):
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.write(results)


def test_lengths_are_counted_in_bars(job):
    lengths = [3, 3, 4, 10, 12]
    write(job, [answer(i, completion_tokens=n) for i, n in enumerate(lengths)] + [failure(9)])
    with job.journal() as journal:
        assert journal.histogram("completion_tokens", 5) == (3, 2, [3, 0, 0, 1, 1])
        assert journal.histogram("completion_tokens", 100) == (
            *(3, 1),
            [2, 1, 0, 0, 0, 0, 0, 1, 0, 1],
        )
        assert journal.histogram("prompt_tokens", 5) == (5, 1, [5])
        assert journal.quantiles("completion_tokens", [0.5, 1.0]) == [4, 12]
        assert journal.quantiles("decode_s", [0.5]) == [2.0]


def test_a_journal_without_answers_has_no_lengths(job):
    write(job, [failure(0)])
    with job.journal() as journal:
        assert journal.histogram("completion_tokens", 5) is None
        assert journal.quantiles("completion_tokens", [0.5]) is None
        assert journal.answered(5) == []


def test_rows_to_look_at_are_spread_over_the_job(make_job):
    job = make_job(n=2)
    ok = [answer(row, sample=s) for row in range(100) if row != 20 for s in (0, 1)]
    write(job, [*ok, failure(20)])
    with job.journal() as journal:
        assert journal.answered(5) == [0, 21, 40, 60, 80]
        assert journal.answered(1) == [0]
        assert len(journal.answered(1000)) == 99


def test_the_first_rows_that_failed_for_each_reason(make_job):
    job = make_job(n=2)
    twice = [Result(1, s, "error", error="x", error_kind="b") for s in (0, 1)]
    write(job, [*twice, *(failure(row, kind="a" if row % 2 else "b") for row in range(2, 20))])
    with job.journal() as journal:
        assert journal.failing(3) == {"b": [1, 2, 4], "a": [3, 5, 7]}
