"""Records what a terminal shows while a job is submitted, left, watched, killed and resumed.

    python docs/recording/make.py           # docs/recording/batchrun.cast, from a real run
    npm install svg-term-cli                # renders it, needed for nothing else
    python docs/recording/make.py --render node_modules/.bin/svg-term    # and batchrun.svg

A shell runs in a pseudo-terminal; the commands are typed into it and run for real. Nothing is
edited but time: waits are cut to `LONGEST_S`. The format is asciicast v2.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS, ROWS = 108, 36
SHELL_PROMPT = r"\e[1;32m$\e[0m "
PROMPT = re.escape(SHELL_PROMPT.replace(r"\e", "\x1b"))
KEY_S = 0.04  # between two keys
READ_S = 1.4  # for a reader to take in what a command printed
LONGEST_S = 1.6  # that nothing happens in the recording
LAST_S = 7.0  # that the end stays
FRAME_S = 0.11  # what is printed within it is one frame
PATIENCE_S = 120.0


class Terminal:
    """A shell in a pseudo-terminal, and all that it shows.

    Args:
        home: Its home and working directory.
    """

    def __init__(self, home: Path) -> None:
        environment = {
            **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PS1": SHELL_PROMPT,
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
        }
        self.events: list[tuple[float, str]] = []
        self._ahead = ""  # shown behind what was awaited last
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._pid, self._handle = pty.fork()
        if self._pid == 0:
            os.chdir(home)
            shell = ["bash", "--noprofile", "--norc", "--noediting", "-i"]
            os.execvpe("bash", shell, environment)
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.until(PROMPT)

    def until(self, pattern: str, then_s: float = 0.0) -> None:
        """Go on when a pattern has been shown behind what was awaited last, and some seconds more.

        Raises:
            TimeoutError: It never was; the message has what was shown.
        """
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self._ahead)) is None:
            self._read(deadline - time.monotonic())
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pattern!r} was not shown, but {self._ahead!r}")
        self._ahead = self._ahead[found.end() :]
        end = time.monotonic() + then_s
        while (left := end - time.monotonic()) > 0:
            self._read(left)

    def _read(self, timeout_s: float) -> None:
        if select.select([self._handle], [], [], max(0, timeout_s))[0]:
            shown = self._decode(os.read(self._handle, 65536))
            self.events.append((time.monotonic(), shown))
            self._ahead += shown

    def press(self, keys: str) -> None:
        """Type, as fast as a person does who knows the command."""
        for key in keys:
            os.write(self._handle, key.encode())
            self.until("", KEY_S)

    def enter(self, line: str) -> None:
        """Type a line and run it."""
        self.press(line)
        self.until("", 0.4)
        self.press("\r")

    def leave(self) -> None:
        """End the shell."""
        os.close(self._handle)  # which hangs up
        os.waitpid(self._pid, 0)


def perform(terminal: Terminal) -> None:
    """The story: a job that outlives its view, and its own death."""
    terminal.enter("batchrun submit prompts.parquet --chat --max-tokens 64 -o out.parquet")
    terminal.until(rows(2))
    terminal.press("\x03")
    terminal.until(PROMPT, READ_S)
    terminal.enter("batchrun watch")
    terminal.until(rows(8))
    terminal.press("\x03")
    terminal.until(PROMPT)
    terminal.enter("kill -9 -- -$(cat ~/.batchrun/jobs/*/lock)  # all its processes")
    terminal.until(PROMPT)
    terminal.enter("batchrun list")
    terminal.until("interrupted")
    terminal.until(PROMPT, READ_S)
    terminal.enter("batchrun resume")
    terminal.until(PROMPT, READ_S)
    terminal.enter("clear; batchrun stats")
    terminal.until(PROMPT)


def rows(at_least: int) -> str:
    """What a bar shows when so many of 64 rows are done, or more."""
    return rf" ({'|'.join(map(str, range(at_least, 65)))})/64 "


def prepare(home: Path, prompts: Path) -> None:
    """The input, and a model that is converted and checked already: that is done once for all."""
    shutil.copy(prompts, home)
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("BATCHRUN_HOME", None)

    def batchrun(*arguments: str) -> None:
        command = [sys.executable, "-m", "batchrun", *arguments]
        subprocess.run(command, cwd=home, env=environment, check=True, stdout=subprocess.DEVNULL)

    batchrun(
        "submit", "prompts.parquet", "--limit", "1", "--max-tokens", "2", "--output", "x.jsonl"
    )
    [job] = (home / ".batchrun" / "jobs").iterdir()
    batchrun("rm", job.name)
    (home / "x.jsonl").unlink()


def frames(events: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Events with times from 0, what belongs together joined, and no wait longer than needed."""
    joined: list[tuple[float, str]] = []
    at = last = events[0][0]
    now = 0.0
    for when, shown in events:
        now += min(when - last, LONGEST_S)
        last = when
        if joined and when - at < FRAME_S:
            joined[-1] = (joined[-1][0], joined[-1][1] + shown)
        else:
            joined.append((now, shown))
            at = when
    return joined


def write_cast(path: Path, shown: list[tuple[float, str]]) -> None:
    """Asciicast v2: a header, then a line an event."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "env": {"TERM": "xterm-256color"}}
    end = (shown[-1][0] + LAST_S, "\x1b[0m")  # changes nothing; an endless loop needs a pause
    lines = [header, *([round(when, 3), "o", text] for when, text in [*shown, end])]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    """Record, and render where told how."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", metavar="SVG-TERM", help="the renderer: also write the SVG")
    parser.add_argument("--keep", action="store_true", help="render what was recorded before")
    options = parser.parse_args()
    cast = HERE / "batchrun.cast"
    if not options.keep:
        with tempfile.TemporaryDirectory(prefix="d-") as name:
            home = Path(name)
            prepare(home, HERE.parents[1] / "examples" / "prompts.parquet")
            terminal = Terminal(home)
            perform(terminal)
            events = list(terminal.events)
            terminal.leave()
        write_cast(cast, frames(events))
    if options.render:
        render = [options.render, "--in", str(cast), "--out", str(cast.with_suffix(".svg"))]
        subprocess.run([*render, "--window", "--no-optimize"], check=True)


if __name__ == "__main__":
    main()
