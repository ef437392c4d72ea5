"""What may leave for a terminal: lines of visible characters, each of which stays one."""

import ast
import io
import json
import logging
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest

from batchrun.terminal import guard_libraries, printable, say, say_json

ROOT = Path(__file__).parent.parent
SHOWN = {
    "plain text, with 'quotes' and C:\\path": None,
    "\x1b[2Jgone\x1b]0;title\x07": r"\x1b[2Jgone\x1b]0;title\x07",
    "a\r\ndone: 100 rows": r"a\r\ndone: 100 rows",
    "\x9b31m\x85\x7f\x00\t": r"\x9b31m\x85\x7f\x00\t",
    "\u202egnp.exe\u202c \u2066x\u2069": r"\u202egnp.exe\u202c \u2066x\u2069",
    "a\u2028b\u2029c\u200bd\ufeffe\xadf": r"a\u2028b\u2029c\u200bd\ufeffe\xadf",
    "ad\u200dmin, a\u200c": r"ad\u200dmin, a\u200c",
    "\udcff.jsonl, \ud83d": r"\udcff.jsonl, \ud83d",
    "\U000e0041hidden": r"\U000e0041hidden",
    # What people write stays what it is.
    "👩‍👩‍👧‍👦 👍🏽 ❤️ 🇩🇪": None,
    "e\u0301tude, नमस्ते, क्‍ष": None,
    "שלום עולם, مرحبا بالعالم, می‌خواهم": None,
    "日本語 中文 한국어": None,
}


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_shown_of_a_text(text):
    assert printable(text) == (SHOWN[text] or text)


def test_no_character_but_visible_ones_is_shown():
    unseen = {"Cc", "Cs", "Zl", "Zp"}
    for number in range(sys.maxunicode + 1):
        shown = printable(chr(number))
        assert not unseen & {unicodedata.category(c) for c in shown}
        if unicodedata.bidirectional(chr(number)) in {
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        }:
            assert shown.isascii()


def test_of_a_long_value_both_ends_are_shown():
    text = "begin" + "x" * 1_000_000 + "end"
    shown = printable(text, 100)
    assert shown.startswith("beginx")
    assert shown.endswith("xend")
    assert "999,908 characters" in shown
    assert len(shown) < 150


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_text_can_be_printed_in_every_encoding(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    say("ü\ud800\n✓", "second", stream=stream)
    lines = raw.getvalue().decode(encoding).split("\n")
    assert len(lines) == 3
    assert lines[0] == (r"ü\ud800\n✓" if encoding == "utf-8" else lines[0])
    assert lines[1:] == ["second", ""]


def test_json_on_a_terminal_is_ascii_and_the_same_value(capsys):
    value = {"\x1b[2J": "\x7f\u202e\ud800\n", "n": [1, None]}
    say_json(value)
    out = capsys.readouterr().out
    assert out.isascii()
    assert not {c for c in out if not c.isprintable()} - {"\n"}
    assert json.loads(out) == value


def test_what_libraries_say_passes_too(caplog):
    factory, formatted = logging.getLogRecordFactory(), warnings.formatwarning
    try:
        guard_libraries()
        logging.getLogger("a.library").warning("a model of type %s", "\x1b[2J\nerror: x")
        shown = warnings.formatwarning("\x1b[2J\nx", UserWarning, "a.py", 1)
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatted
    assert caplog.messages == [r"a model of type \x1b[2J\nerror: x"]
    assert shown == "a.py:1: UserWarning: \\x1b[2J\\nx\n"


PRINTS = {"print", "print_exc", "print_exception", "print_tb", "echo", "secho"}
ASKS = {"click.prompt", "click.confirm", "tqdm.write"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}


def bypasses(tree):
    """Calls that print, and writes to the streams."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if last in PRINTS or name in ASKS:
            yield name
        if last in {"write", "writelines"} and STREAMS & set(name.split(".")):
            yield name


def test_nothing_is_printed_past_the_gate():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in ("allocator", "batchrun", "jobs")
        for path in (ROOT / package).rglob("*.py")
        for name in bypasses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


def test_the_rule_sees_what_bypasses_the_gate():
    code = "print(1)\nclick.echo(2)\nsys.stderr.write('')\ntqdm.write('')\ntraceback.print_exc()"
    assert len(list(bypasses(ast.parse(code)))) == 5
