"""Charts stay inside their frame, begin at zero, and have round numbers at their axes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.report.charts import Line, bar_chart, clock, levels, line_chart, steps
from batchrun.report.text import rate, size

VALUES = st.lists(st.floats(0, 1e13) | st.integers(0, 10**13), min_size=1, max_size=30)


def numbers(path):
    return [float(n) for n in re.findall(r"-?[\d.]+", path)]


@given(VALUES, st.sampled_from([rate, size]), st.booleans())
def test_all_that_is_drawn_is_inside(values, shown, log):
    points = [(float(i), y) for i, y in enumerate(values)]
    chart = line_chart(
        "x", [Line("a", [points]), Line("b", [[]])], width_s=len(values), shown=shown, log=log
    )
    if not any(value > 1e-9 for value in values):
        assert chart is None
        return
    drawn = [*(path for _, path in chart.lines), chart.area]
    assert all(0 <= n <= 1000 for path in drawn for n in numbers(path))
    assert all(-1e-9 <= tick.at <= 100 + 1e-9 for tick in (*chart.xs, *chart.ys))
    assert 2 <= len(chart.ys) <= 8
    assert 1 <= len(chart.xs) <= 8
    assert log or chart.ys[0].text in {"0", "0 B"}


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=40).filter(any), st.integers(1, 9))
def test_bars_are_as_high_as_what_they_count(counts, width):
    most = 3 + len(counts) * width
    chart = bar_chart("x", {"least": 3, "width": width, "counts": counts, "max": most}, "")
    assert chart.area.count("M") == sum(count > 0 for count in counts)
    assert all(0 <= n <= 1000 for n in numbers(chart.area))
    tops = [float(top) for top in re.findall(r"V([\d.]+)H", chart.area)]
    known = [count for count in counts if count]
    assert tops[known.index(max(known))] == min(tops)
    assert f"{sum(counts):,} in all" in chart.text
    assert (chart.xs[0].text, chart.xs[-1].text) == ("3", f"{most:,}")


def test_axes_have_round_numbers():
    line = Line("a", [[(0, 1.0), (3600, 700.0)]])
    chart = line_chart("x", [line], width_s=3600, shown=rate, marks=[900])
    assert [tick.text for tick in chart.ys] == ["0", "200", "400", "600", "800"]
    assert [tick.text for tick in chart.xs] == ["0", "20 min", "40 min", "1 h"]
    assert chart.marks == [25.0]
    assert chart.text == "a: 700 at most, 700 at the end"
    slow = line_chart("x", [Line("a", [[(0, 0.045)]])], width_s=1, shown=rate)
    assert [tick.text for tick in slow.ys] == ["0", "0.02", "0.04", "0.06"]
    sizes = line_chart("x", [Line("a", [[(0, 150 << 20)]])], width_s=1, shown=size)
    assert [tick.text for tick in sizes.ys] == ["0 B", "50 MiB", "100 MiB", "150 MiB"]
    log = line_chart("x", [Line("a", [[(0, 40e6), (1, 40e9)]])], width_s=1, shown=size, log=True)
    assert [tick.text for tick in log.ys] == ["32 MiB", "1 GiB", "32 GiB", "1 TiB"]


def test_unknown_values_are_left_out():
    assert levels([1, 2, 3], [None, 5, None]) == [(2, 5)]
    assert steps([0, 2, 4], [None, 10.0, 20.0]) == [(0, 10.0), (1, 10.0), (3, 20.0), (4, 20.0)]
    assert steps([0], [None]) == steps([], []) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5 s"), (30, "30 s"), (90, "1 min 30 s"), (3600, "1 h"), (90000, "25 h")],
)
def test_times(value, text):
    assert clock(value) == text
