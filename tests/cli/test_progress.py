"""What a running job shows, in a terminal and outside of one."""

import io

import pytest

from batchrun.cli.progress import View, Waiting
from batchrun.runner.live import Progress
from batchrun.runner.reports import Rates


def at(rows_done, tokens=0, *, total=100, phase="run", **more):
    defaults = {"rows_total": total, "rows_done": rows_done, "completion_tokens": tokens}
    return Progress(**defaults, phase=phase, **more)


class Terminal(io.StringIO):
    encoding = "utf-8"

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
    monkeypatch.setattr("batchrun.cli.progress.time.time", clock)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    return clock


def drawn(stream, width=80):
    """The lines that a terminal shows at the end, without colours."""
    rows, row = [""], 0
    text = stream.getvalue()
    position = 0
    while position < len(text):
        if text.startswith("\x1b[", position):
            end = position + 2
            while not text[end].isalpha():
                end += 1
            amount, what = text[position + 2 : end], text[end]
            if what == "A":
                row -= int(amount or 1)
            elif what == "K":
                rows[row] = ""
            position = end + 1
            continue
        if text[position] == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif text[position] != "\r":
            rows[row] += text[position]
        position += 1
    assert all(len(line) <= width for line in rows)
    return [line.rstrip() for line in rows]


def test_rates_are_of_the_last_seconds_and_on_average():
    rates = Rates()
    assert rates.now is None
    rates.add(0, 1000)
    assert rates.now is None
    for second in range(1, 41):
        rates.add(second, 1000 + 10 * second + (max(0, second - 20) * 90))
    assert rates.now == pytest.approx(100)
    assert rates.mean == pytest.approx(55)


def test_lines_come_with_each_phase_and_more_and_more_seldom(clock):
    stream = io.StringIO()
    view = View(stream)
    view.update(at(40, phase="load", phase_done=3 << 30, phase_total=16 << 30))
    for second in range(600):
        clock.now += 1
        view.update(at(40 + second // 10, rows_resumed=40, tokens_per_s=float(second)))
    view.update(at(100, phase="export", phase_done=70, phase_total=100, rows_failed=2))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "loading the model: 3.0 GiB of 16.0 GiB"
    assert lines[1] == "running: 40 of 100 rows, 40 from earlier runs (40%), 0 tokens/s"
    assert lines[2] == "running: 40 of 100 rows, 40 from earlier runs (40%), 2 tokens/s"
    assert lines[-1] == "writing the output: 70 of 100 rows, 2 failed"
    running = [line for line in lines if line.startswith("running: ")]
    assert 60 < len(running) < 120


def test_what_is_not_known_is_not_said(clock):
    stream = io.StringIO()
    view = View(stream)
    view.update(Progress(submitted_at=97.0))
    view.update(at(3, total=None))
    assert stream.getvalue().splitlines() == ["starting: 3 s", "running: 3 of ? rows"]


def test_100_percent_is_all(clock):
    stream = io.StringIO()
    view = View(stream)
    view.update(at(999_999, total=1_000_000))
    clock.now += 10
    view.update(at(1_000_000, total=1_000_000))
    assert stream.getvalue().splitlines() == [
        "running: 999,999 of 1,000,000 rows (99%)",
        "running: 1,000,000 of 1,000,000 rows (100%)",
    ]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ((100.0, 95.0, 105.0), "about 1 min 40 s left"),
        ((20.0, 14.0, 26.0), "about 20 s left (14 to 26 s)"),
        ((1500.0, 900.0, 2400.0), "about 25 min left (15 to 40 min)"),
        ((4000.0, 2000.0, 9000.0), "about 67 min left (33 min to 2 h 30 min)"),
        ((259_200.0, 172_800.0, 345_600.0), "about 3.0 days left (2.0 to 4.0 days)"),
    ],
)
def test_the_time_left_is_told_with_its_range(clock, left, said):
    stream = io.StringIO()
    seconds, least, most = left
    View(stream).update(at(5, seconds_left=seconds, least_left=least, most_left=most))
    assert stream.getvalue() == f"running: 5 of 100 rows (5%), {said}\n"


def test_closing_lines_prints_the_last_state_once(clock):
    stream = io.StringIO()
    view = View(stream)
    view.update(at(1))
    view.update(at(7))
    view.close()
    view.close()
    assert stream.getvalue().splitlines() == [
        "running: 1 of 100 rows (1%)",
        "running: 7 of 100 rows (7%)",
    ]


def test_a_terminal_shows_all_that_is_known(clock):
    stream = Terminal()
    view = View(stream)
    view.update(at(0, phase="load", phase_done=1 << 30, phase_total=4 << 30, submitted_at=97.0))
    view.message("a note")
    clock.now += 60
    more = {"running": 256, "waiting": 1240, "tokens_per_s": 1467.2, "mean_tokens_per_s": 1390.0}
    more |= {"kv_live": 96 << 20, "kv_mapped": 192 << 20, "kv_budget": 384 << 20}
    more |= {"seconds_left": 80.0, "least_left": 61.0, "most_left": 119.0, "submitted_at": 97.0}
    view.update(at(620, total=1000, rows_failed=3, reason="prompt_too_long", **more))
    view.close()
    assert drawn(stream) == [
        "a note",
        "running  1 min 3 s, about 1 min 20 s left (1 min 1 s to 1 min 59 s)",
        "━━━━━━━━━━━━━━━━━━━───────────── 62%  620 of 1,000 rows",
        "1,467 tokens/s, 1,390 on average  256 rows running, 1,240 waiting",
        "KV memory ━━━━━━━━━━━━──────────── 96.0 MiB live, 192.0 MiB mapped of 384.0 MiB",
        "3 failed, most often: prompt too long",
        "",
    ]


def test_a_narrow_terminal_cuts_lines_instead_of_wrapping_them(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    view = View(stream)
    for _ in range(3):
        clock.now += 1
        view.update(at(620, total=1_000_000, kv_live=1, kv_mapped=2, kv_budget=9, rows_failed=1))
    view.close()
    assert len(drawn(stream, 30)) == 5


def test_no_colour_where_none_is_wanted(clock, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    view = View(stream)
    view.update(at(50, rows_failed=1))
    view.close()
    assert "\x1b[3" not in stream.getvalue()
    assert "failed" in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode_gets_plain_bars(clock, encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    stream.isatty = lambda: True
    view = View(stream)
    view.update(at(50, kv_live=1, kv_mapped=2, kv_budget=3, submitted_at=1.0))
    view.message("a name in every line " * 8)
    view.close()
    assert b"#" * 16 in raw.getvalue()
    assert b"." * 16 in raw.getvalue()


def test_a_terminal_that_can_not_move_the_cursor_gets_lines(clock, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    View(stream).update(at(50))
    assert stream.getvalue() == "running: 50 of 100 rows (50%)\n"


def test_what_takes_long_says_so(clock):
    stream = io.StringIO()
    with Waiting("reading the input", stream) as waiting:
        waiting.look()
        for _ in range(8):
            clock.now += 0.5
            waiting.look("a.parquet, rows 1,000 on")
    assert stream.getvalue().splitlines() == [
        "reading the input: 2 s, a.parquet, rows 1,000 on",
        "reading the input: 4 s, a.parquet, rows 1,000 on",
    ]


def test_what_takes_long_leaves_nothing_on_a_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Waiting("reading the input", stream) as waiting:
        for _ in range(8):
            clock.now += 0.5
            waiting.look("\x1b[2Ja.parquet")
        assert r"\x1b[2Ja.parquet" in stream.getvalue()
    assert drawn(stream) == [""]
