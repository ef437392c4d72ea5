"""What a running job shows, in a terminal and outside of one."""

import io

import pytest

from batchrun.cli.progress import Rates, View
from batchrun.runner.live import Progress


def at(rows_done, tokens, *, total=100, failed=0, resumed=0, phase="run"):
    return Progress(
        rows_total=total,
        rows_done=rows_done,
        rows_failed=failed,
        rows_resumed=resumed,
        completion_tokens=tokens,
        running=1,
        waiting=0,
        elapsed_s=0.0,
        phase=phase,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("batchrun.cli.progress.time.monotonic", clock)
    return clock


def test_rates_are_of_the_last_seconds_and_not_of_resumed_rows():
    rates = Rates()
    rates.add(0, at(50, 0, resumed=50))
    assert rates.tokens_per_s() is None
    rates.add(5, at(50, 100))
    assert rates.tokens_per_s() == pytest.approx(20)
    assert rates.seconds_left(100, 50) is None  # no row finished yet: nothing to go by
    for second in range(10, 40, 5):
        rates.add(second, at(50 + second, 100 + 40 * (second - 5)))
    assert rates.tokens_per_s() == pytest.approx(40)
    assert rates.seconds_left(100, 85) == pytest.approx(15)
    assert rates.seconds_left(100, 52) is None
    rates.add(40, at(100, 2000, phase="export"))
    assert rates.tokens_per_s() is None
    assert rates.seconds_left(None, 85) is None


def test_lines_come_at_intervals_and_with_each_phase(clock):
    stream = io.StringIO()
    view = View(stream)
    view.update(at(40, 0, resumed=40, phase="load"))
    for _ in range(20):
        clock.now += 1
        view.update(at(40 + int(clock.now - 100), int(100 * (clock.now - 100)), resumed=40))
    view.update(at(100, 2000, resumed=40, failed=2, phase="export"))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "loading the model: 40 of 100 rows (40%), 40 resumed"
    assert lines[1] == "running: 41 of 100 rows (41%), 40 resumed"
    assert lines[2] == "running: 46 of 100 rows (46%), 100 tokens/s, 40 resumed, 54.0 s left"
    assert [line.split(":")[0] for line in lines] == [
        "loading the model",
        *["running"] * 4,
        "writing the output",
    ]
    assert lines[-1] == "writing the output: 100 of 100 rows (100%), 40 resumed, 2 failed"


def test_closing_lines_prints_the_last_state_once(clock):
    stream = io.StringIO()
    view = View(stream)
    view.update(at(1, 0))
    view.update(at(7, 0))
    view.close()
    view.close()
    assert stream.getvalue().splitlines()[-1].startswith("running: 7 of 100 rows")
    assert len(stream.getvalue().splitlines()) == 2


def test_lines_do_without_a_total(clock):
    stream = io.StringIO()
    View(stream).update(at(3, 0, total=None))
    assert stream.getvalue() == "running: 3 of ? rows\n"


def test_a_bar_starts_at_the_resumed_rows_and_ends_at_the_last():
    stream = Terminal()
    view = View(stream)
    view.update(at(40, 0, resumed=40, phase="load"))
    view.update(at(100, 500, resumed=40, failed=3))
    view.message("a note")
    view.close()
    shown = stream.getvalue()
    assert "40/100" in shown
    assert "100/100" in shown
    assert "40 resumed, 3 failed" in shown
    assert "a note\n" in shown
