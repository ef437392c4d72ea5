"""Records what a terminal shows while a job is submitted, left, watched, killed and resumed.

    make recording                              # batchrun.cast, from a real run, and batchrun.svg
    python docs/recording/make.py --draw        # the SVG alone, from the cast as it is

A shell runs in a pseudo-terminal; the commands are typed into it and run for real. Nothing is
edited but time: waits are cut, the job is stopped where somebody types or reads, and the first
picture is the job at work. tests/test_recording.py
tells the story again, with a tiny model, and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from draw import draw
from session import COLUMNS, PROMPT, ROWS, Terminal, frames, read_cast, write_cast

HERE = Path(__file__).parent
CAST, SVG = HERE / "batchrun.cast", HERE / "batchrun.svg"
SUBMIT = "batchrun submit prompts.parquet --chat --max-tokens 64 -o out.parquet"
KILL = "kill -9 -- -$(grep -o '[0-9]*' ~/.batchrun/jobs/*/lock | head -1)  # all its processes"
_READ_S = 1.4  # for a reader to take in what a command printed


def perform(terminal: Terminal, home: Path, submit: str = SUBMIT, more: int = 8) -> int:
    """The story: a job that outlives its view, and its own death.

    The job is stopped where somebody types or reads, so that it can't be done too early.

    Args:
        terminal: Where.
        home: The home of its shell.
        submit: The first command.
        more: How many rows shall be done before the job is killed.

    Returns:
        How many events had happened then: up to there is the first picture.
    """
    terminal.enter(submit)
    terminal.when(lambda: rows_done(home) >= 2, "two rows")
    os.killpg(leader(home), signal.SIGSTOP)
    terminal.rest(0.5)  # until the view shows them
    first = len(terminal.events)
    terminal.rest(_READ_S)
    terminal.press("\x03")
    terminal.until(PROMPT, _READ_S)
    terminal.enter("batchrun watch")
    before = len(terminal.events)
    terminal.when(lambda: any("/" in t or "rows" in t for _, t in terminal.events[before:]), "it")
    if rows_done(home) < more:
        os.killpg(leader(home), signal.SIGCONT)
        terminal.when(lambda: rows_done(home) >= more, f"{more} rows")
        os.killpg(leader(home), signal.SIGSTOP)
    terminal.rest(_READ_S)
    terminal.press("\x03")
    terminal.until(PROMPT)
    terminal.enter(KILL)
    terminal.until(PROMPT)
    terminal.enter("batchrun list")
    terminal.until("interrupted")
    terminal.until(PROMPT, _READ_S)
    terminal.enter("batchrun resume")
    terminal.until(PROMPT, _READ_S)
    terminal.enter("clear; batchrun stats | head -26")
    terminal.until(PROMPT)
    return first


def leader(home: Path) -> int:
    """The process whose group is that of the only job in a home."""
    [path] = home.glob(".batchrun/jobs/*/lock")
    return int(json.loads(path.read_text(encoding="ascii"))["pid"])


def rows_done(home: Path) -> int:
    """As the only job in a home says itself."""
    for path in home.glob(".batchrun/jobs/*/progress.json"):
        return int(json.loads(path.read_text(encoding="ascii"))["rows_done"])
    return 0


def prepare(home: Path, prompts: Path) -> None:
    """The input, and a model that is converted and checked already: that is done once for all."""
    shutil.copy(prompts, home)
    environment = {**os.environ, "HOME": str(home)}
    usual = Path(environment.pop("BATCHRUN_HOME", Path.home() / ".batchrun"))
    if (usual / "models").is_dir():  # as after `make demo`
        (home / ".batchrun").mkdir(mode=0o700)
        (home / ".batchrun" / "models").symlink_to(usual / "models")

    def batchrun(*arguments: str) -> None:
        command = [sys.executable, "-m", "batchrun", *arguments]
        subprocess.run(command, cwd=home, env=environment, check=True, stdout=subprocess.DEVNULL)

    batchrun(
        "submit", "prompts.parquet", "--limit", "1", "--max-tokens", "2", "--output", "x.jsonl"
    )
    [spec] = home.glob(".batchrun/jobs/*/job.json")
    batchrun("rm", spec.parent.name)
    (home / "x.jsonl").unlink()


def record() -> None:
    """Write the cast."""
    with tempfile.TemporaryDirectory(prefix="d-") as name:
        home = Path(name)
        prepare(home, HERE.parents[1] / "examples" / "prompts.parquet")
        terminal = Terminal(home)
        first = perform(terminal, home)
        events = list(terminal.events)
        terminal.leave()
    write_cast(CAST, frames(events, first))


def main() -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw what was recorded before")
    if not parser.parse_args().draw:
        record()
    SVG.write_text(draw(read_cast(CAST), COLUMNS, ROWS), encoding="utf-8")


if __name__ == "__main__":
    main()
