"""The table of all types: what it says of some is tried here, and no row of it says wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import transformers as tf

from tests.parity import sweep, zoo

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
LISTED = {verdict.kind: verdict for verdict in sweep.listed(PAGE)}
# One for each way to be hooked, to be wrong, and to be refused.
TRIED = [
    *("llama", "falcon", "gptj", "stablelm", "nemotron", "llama4", "phimoe (window)", "mllama"),
    *("qwen2_moe (window)", "qwen2_5_vl", "gemma4_text", "granitemoehybrid", "doge", "moshi"),
    *("bloom", "mamba", "deepseek_v4", "deepseek_v32", "jamba", "zaya", "pi0", "step3p7", "bert"),
]
needs_its_release = pytest.mark.skipif(
    f"transformers {tf.__version__}:" not in PAGE, reason="another transformers than the page's"
)


def test_no_row_says_wrong() -> None:
    counts = Counter(verdict.what for verdict in LISTED.values())
    assert counts["wrong"] == 0
    assert ", ".join(f"{counts[what]} {what}" for what in sweep.WHAT) in PAGE
    assert counts["same"] > 150
    assert all(verdict.why for verdict in LISTED.values() if verdict.what != "same")


@needs_its_release
def test_every_type_has_a_row() -> None:
    assert {kind.removesuffix(" (window)") for kind in LISTED} == {*zoo.TYPES, *zoo.WITH_IMAGES}


@needs_its_release
@pytest.mark.parametrize("name", TRIED)
def test_the_page_tells_what_is_so(name: str) -> None:
    kind = name.removesuffix(" (window)")
    assert sweep.judge(kind, window=kind != name) == LISTED[name]


def test_a_table_is_read_as_it_was_written() -> None:
    verdicts = [sweep.Verdict("a", "same"), sweep.Verdict("b (window)", "refused", "it is | so")]
    page = sweep.written("before <!-- the sweep's table -->\nold\n<!-- its end --> after", verdicts)
    assert sweep.listed(page) == [verdicts[0], verdicts[1]._replace(why="it is / so")]
    assert page.startswith("before ")
    assert page.endswith(" after")
    assert "1 same, 1 refused, 0 not built" in page
    assert sweep.written(page, verdicts) == page
