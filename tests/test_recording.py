"""The recording shows what the program prints today: its story is told again, and compared."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyte
import pytest

from tests.tiny import write_tiny_model

FOLDER = Path(__file__).parent.parent / "docs" / "recording"
sys.path.append(str(FOLDER))  # its scripts import each other

import make  # noqa: E402
from draw import draw, pictures  # noqa: E402
from session import COLUMNS, ROWS, Terminal, frames, read_cast  # noqa: E402

Events = list[tuple[float, str]]

SHARED = "One beginning for all rows, of more than a page, as in what is recorded:"

# What depends on the input, the model, the machine or the moment: some lines, names, numbers, bars.
VARIES = re.compile(
    r"^(?:starting|loading|compiling|check\w+|sampling parameters) .*|(?<=row )\d+: .*"
    r"|, about [^)\n]*(?:\)|left)|prompts-\S+|smollm2-\S+|\S*/\S+|\d[\d,.:%]*"
    r"|\b(?:tiny|left|native|bfloat16|float32|amx|avx\d*|torch|[KMGT]iB|ms|us|s|min|h)\b",
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def recorded() -> Events:
    return read_cast(make.CAST)


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Events:
    """The same story. The job is stopped while its view is left: a tiny model would be done."""
    home = tmp_path_factory.mktemp("h")
    model = write_tiny_model(home / "tiny", max_position_embeddings=2048)
    rows = [{"prompt": f"{SHARED} {n}", "max_tokens": 4 if n < 4 else 1200} for n in range(64)]
    rows[0]["stop_token_ids"] = list(range(300))
    pq.write_table(pa.Table.from_pylist(rows), home / "prompts.parquet")

    terminal = Terminal(home)
    try:
        submit = f"{make.SUBMIT} -m {model.name} --ignore-eos"
        first = make.perform(terminal, home, submit, more=0)
        return frames(terminal.events, first)
    finally:
        terminal.leave()


def test_the_picture_is_drawn_from_the_recording(recorded: Events) -> None:
    drawn = make.SVG.read_text(encoding="utf-8")
    assert drawn == draw(recorded, COLUMNS, ROWS), "make recording, or make.py --draw"


def test_the_first_picture_is_a_job_at_work(recorded: Events) -> None:
    (when, ((first, *_), _)), *later = pictures(recorded, COLUMNS, ROWS)
    assert when == 0
    assert "batchrun submit" in "".join(text for text, *_ in first)
    assert len(later) > 20
    assert "64" in "".join(
        run[0] for row in pictures(recorded, COLUMNS, ROWS)[0][1][0] for run in row
    )


def lines(events: Events) -> list[tuple[str, list[str]]]:
    """Each command that was typed, and every line that it ever showed."""
    screen = pyte.Screen(3 * COLUMNS, 400)  # nothing is wrapped, or scrolled away
    stream = pyte.Stream(screen)
    commands: list[str] = []
    shown: list[dict[str, None]] = []
    cleared = 0  # commands before the screen was cleared
    for _, text in events:
        for part in re.split(r"(?=\x1b\[H\x1b\[2J)", text):
            if part.startswith("\x1b[H"):
                cleared = len(commands)
            stream.feed(part)
            at = cleared - 1
            for line in map(str.rstrip, screen.display):
                if line.startswith("$"):
                    at += 1
                    if at == len(commands):
                        commands.append("")
                        shown.append({})
                    commands[at] = line
                elif line:
                    shown[at][line] = None
    assert commands.pop() == "$"
    return [(command, list(found)) for command, found in zip(commands, shown, strict=False)]


def words(shown: list[str]) -> set[str]:
    """The words of lines, without what varies."""
    return set(re.findall(r"[A-Za-z][A-Za-z'-]+", VARIES.sub(" ", "\n".join(shown))))


def beyond(some: set[str], others: set[str]) -> set[str]:
    """The words that are not among others, nor begin one: the edge of a terminal cuts words."""
    return {word for word in some if not any(other.startswith(word) for other in others)}


def test_the_same_commands_print_the_same_today(recorded: Events, today: Events) -> None:
    before, now = lines(recorded), lines(today)
    assert [command.split(" -")[0] for command, _ in before] == [
        command.split(" -")[0] for command, _ in now
    ]
    for (command, was), (_, shown) in zip(before, now, strict=True):
        assert not beyond(words(was), words(shown)), f"no longer said by {command}: make recording"
        assert not beyond(words(shown), words(was)), f"new in {command}: make recording"
