"""Answers are the same, bit by bit, however a job is run."""

from __future__ import annotations

import pytest

from tests.crash.test_signals import run


def test_a_job_has_the_same_answers_however_it_runs() -> None:
    report = run("tests.crash.bits", "--examples", "16")
    assert report["examples"] == 16
    assert report["kills"] > 2
    assert report["answers_equal"]


@pytest.mark.long
def test_500_jobs_do() -> None:
    assert run("tests.crash.bits", "--examples", "500")["examples"] == 500
