"""The comparison of KV memory: Table 8 has the paper's figures, and the trace meets its targets."""

import io
import json
import xml.etree.ElementTree as ET
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.vmm import AllocatorError
from benchmarks.memory import chart, trace
from benchmarks.memory.__main__ import main
from benchmarks.memory.spaces import paged_space, static_space
from benchmarks.memory.table8 import SHAPES, render, table8, worst_case

DOCS = Path(__file__).parents[2] / "docs"
KIB, MIB = 1 << 10, 1 << 20
SMALL = trace.Case("small", 46_080, 256 * KIB, 1, 32 * MIB, 40)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the benchmark prints, and where its plot is."""
    path = tmp_path_factory.mktemp("plot") / "memory.svg"
    with redirect_stdout(io.StringIO()) as text:
        main(["--plot", str(path)])
    return text.getvalue(), path


@pytest.fixture(scope="module")
def full(shown):
    text, path = shown
    return json.loads(text.splitlines()[-1]), path


def test_targets_on_the_recorded_trace(full):
    assert len(full[0]["cases"]) == 2
    for case in full[0]["cases"]:
        static, paged, ours = (case["ways"][name] for name in ("static", "paged", "batchrun"))
        assert ours["utilisation"] >= 0.95
        assert ours["in_flight_mean"] >= 1.5 * static["in_flight_mean"]
        assert ours["in_flight_mean"] >= 0.99 * paged["in_flight_mean"]
        assert ours["steps"] <= 1.01 * paged["steps"]
        for way in case["ways"].values():
            assert way["used_peak"] <= case["budget"]
            assert way["waste_mean"] == pytest.approx(way["used_mean"] - way["live_mean"])


def test_the_plot_is_an_image_that_loads_nothing(full):
    root = ET.parse(full[1]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(root.itertext())
    for words in ("Sequences in flight", "GiB", "step", "prefers-color-scheme: dark"):
        assert words in text
    assert all(title in text for title in trace.TITLES.values())
    assert full[1].read_text().count("http") == 1, "the name space, and nothing to fetch"


def test_every_way_computes_the_same_tokens():
    runs = trace.compare(SMALL)
    want = sum(prompt + out for prompt, out in SMALL.lengths())
    for run in runs.values():
        # Each sequence's last token is never computed, and one step may be one too many.
        assert want - 40 <= run.computed - run.recomputed <= want
        assert run.moments[-1].live == 0, "the step too many finds nothing"
    assert trace.compare(SMALL) == runs, "the same requests give the same figures"
    assert chart.draw(SMALL, runs).count('class="line') == 6


def test_static_and_paged_take_what_they_must():
    layout = KVLayout((LayerKV(1, 8, 8),), 2, 4096, 100, 1)  # 32 bytes a token
    static = static_space(layout, budget=2 * 3200 + 3199, num_slots=4)
    assert [static.open(), static.open(), static.open()].count(None) == 1
    assert (static.used, static.tokens) == (6400, 0)
    paged = paged_space(layout, budget=3 * 16 * 32, num_slots=2)
    first, second = paged.open(), paged.open()
    assert paged.open() is None
    assert paged.ensure(first, 17)
    assert paged.ensure(second, 16)
    assert not paged.ensure(second, 17)
    assert (paged.used, paged.tokens) == (3 * 16 * 32, 33)
    paged.close(first, step=1)
    assert paged.ensure(second, 17), "what is closed is free at once"
    assert paged.can_fit(48)
    assert not paged.can_fit(49)
    with pytest.raises(AllocatorError):
        paged.ensure(first, 1)


def test_table8_has_the_papers_figures():
    cells = {(c.model, c.tensor_parallel, c.page_size): c for c in table8() if not c.interleaved}

    def at(page_size):
        row = [c for (_, _, size), c in cells.items() if size == page_size]
        return {(c.model, c.tensor_parallel): (c.tokens_per_page, c.waste / MIB) for c in row}

    assert at(64 * KIB) == {
        ("Yi-6B", 1): (64, 4),
        ("Yi-6B", 2): (128, 8),
        ("Llama-3-8B", 1): (32, 4),
        ("Llama-3-8B", 2): (64, 8),
        ("Yi-34B", 1): (32, 7.5),
        ("Yi-34B", 2): (64, 15),
    }
    waste = [waste for _, waste in at(256 * KIB).values()]
    assert (min(waste), max(waste)) == (16, 60)
    assert at(2 * MIB)["Yi-6B", 2][0] == 4096
    assert at(2 * MIB)["Yi-34B", 2][1] == 480


def test_interleaving_wastes_a_page_where_the_papers_layout_wastes_one_for_each_tensor():
    for shape in SHAPES:
        for gpus in (1, 2):
            apart = worst_case(shape, gpus, 2 * MIB, interleaved=False)
            together = worst_case(shape, gpus, 2 * MIB, interleaved=True)
            assert together.waste == gpus * 2 * MIB == apart.waste / (2 * shape.layers)
            assert apart.tokens_per_page == together.tokens_per_page * 2 * shape.layers


def test_the_papers_count_is_one_token_above_what_a_layout_can_waste():
    layout = KVLayout((LayerKV(4, 128, 0),) * 64, 2, 64 * KIB, 8192, 1)  # Yi-6B on one GPU
    worst = max(layout.waste_bytes(tokens) for tokens in range(1, 8193))
    assert worst == 4 * MIB - layout.bytes_per_token


def test_what_is_printed_is_what_the_page_shows(shown, full):
    page = (DOCS / "memory.md").read_text()
    for name, table in zip(("compared", "table8"), tables(shown[0]), strict=True):
        assert f"<!-- {name} -->\n```\n{table}\n```\n" in page
    assert "Yi-34B TP-2" in render(table8())
    assert len(full[0]["table8"]) == 48


def tables(text):
    """The two tables of what is printed."""
    compared, mark, rest = text.partition("\n\ntokens a page |")
    return compared, f"{mark}{rest}".strip().rsplit("\n\n", 1)[0]
