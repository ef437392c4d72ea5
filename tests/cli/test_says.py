"""What the command says to a user who is new to it, or mistyped something."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from batchrun.cli import COMMANDS, main
from batchrun.cli.mistyped import _SYNONYMS
from batchrun.cli.options import TextOrFile


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), capsys.readouterr().err.splitlines()


def test_batchrun_alone_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        assert (ended.value.code, shown.err) == (0, "")
        assert "Usage: batchrun [OPTIONS] COMMAND [ARGS]..." in shown.out
        assert all(f"\n  {name} " in shown.out for name in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("submti", "did you mean batchrun submit?"),
        ("status", "did you mean batchrun list or batchrun watch?"),
        ("run", "did you mean batchrun submit?"),
        ("kill", "did you mean batchrun cancel?"),
        ("delte", "did you mean batchrun rm?"),
        ("qwertz", "batchrun --help lists the commands"),
    ],
)
def test_a_command_that_is_not_there(
    capsys: pytest.CaptureFixture[str], typed: str, hint: str
) -> None:
    expected = [f"error: there is no command '{typed}'", f"hint: {hint}"]
    assert said(capsys, typed, "x.jsonl", "--json") == (2, expected)


def test_synonyms_are_of_commands_that_are_there() -> None:
    for commands in _SYNONYMS.values():
        assert all(name in COMMANDS or name.startswith("--") for name in commands)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--max-token", "did you mean --max-tokens?"),
        ("--max_tokens", "did you mean --max-tokens?"),
        ("--temprature", "did you mean --temperature?"),
        ("--no-draft", "did you mean --no-drafts?"),
        ("--qwertz", "batchrun submit --help"),
    ],
)
def test_an_option_that_is_not_there(
    capsys: pytest.CaptureFixture[str], typed: str, hint: str
) -> None:
    expected = [f"error: there is no option {typed}", f"hint: {hint}"]
    assert said(capsys, "submit", "x.jsonl", typed, "4") == (2, expected)


def test_a_template_or_system_message_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Summarise:\n{text}\n\n", encoding="utf-8")
    read = TextOrFile().convert
    assert read(f"@{path}", None, None) == "Summarise:\n{text}\n"
    assert read("@@home {text}", None, None) == "@home {text}"
    assert read("{text} @ noon", None, None) == "{text} @ noon"
    path.write_bytes(b"\xff")
    for value, said in ((f"@{path}", "not UTF-8"), ("@nowhere", "'nowhere' can't be read")):
        with pytest.raises(click.BadParameter, match=said):
            read(value, None, None)
