"""What the command says to a user who is new to it, or mistyped something."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from batchrun.cli.options import TextOrFile


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
