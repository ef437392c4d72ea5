"""docs/kernels.md says how many lines each kernel took; here they are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.lines import lines_of_code

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "batchrun" / "engine"
FILES = {path.name: path for path in (ENGINE / "attention").glob("*.*")} | {
    f"cpu/{path.name}": path
    for pattern in ("attention*.*", "*.h")
    for path in (ENGINE / "cpu").glob(pattern)
    if path.name != "layers.h"
}
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `((?:cpu/)?\w+\.(?:py|cpp|h))` \|.*\| (\d+) \|$", PAGE, re.MULTILINE)


def test_every_file_is_on_the_page() -> None:
    assert {name for name, _ in ROWS} == set(FILES)


@pytest.mark.parametrize(("name", "count"), ROWS)
def test_the_page_has_the_counts(name: str, count: str) -> None:
    assert lines_of_code(FILES[name]) == int(count)
