"""docs/kernels.md says how many lines each kernel took; here they are counted."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "batchrun" / "engine"
FILES = {path.name: path for path in (ENGINE / "attention").glob("*.*")} | {
    f"cpu/{path.name}": path
    for pattern in ("attention*.*", "*.h")
    for path in (ENGINE / "cpu").glob(pattern)
}
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `((?:cpu/)?\w+\.(?:py|cpp|h))` \|.*\| (\d+) \|$", PAGE, re.MULTILINE)
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(source: str) -> int:
    """Lines that hold anything but comments and docstrings."""
    if source.startswith("//"):
        lines = [line.strip() for line in source.splitlines()]
        return sum(line != "" and not line.startswith("//") for line in lines)
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - skipped)


def test_lines_are_counted() -> None:
    source = '"""A docstring\nof two."""\n\nx = (  # comment\n    1,\n)\n# more\ny = """a\nb"""\n'
    assert lines_of_code(source) == 5
    assert lines_of_code("// A comment\n\nint x;  // one\n  // more\n") == 1


def test_every_file_is_on_the_page() -> None:
    assert {name for name, _ in ROWS} == set(FILES)


@pytest.mark.parametrize(("name", "count"), ROWS)
def test_the_page_has_the_counts(name: str, count: str) -> None:
    assert lines_of_code(FILES[name].read_text(encoding="utf-8")) == int(count)
