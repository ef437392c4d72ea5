"""A shell in a pseudo-terminal, which is typed into, and what it showed: asciicast v2."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

COLUMNS, ROWS = 108, 28
SHELL_PROMPT = r"\e[1;32m$\e[0m "
PROMPT = re.escape(SHELL_PROMPT.replace(r"\e", "\x1b"))
PATIENCE_S = 300.0
_KEY_S = 0.04  # between two keys
_LONGEST_S = 1.6  # that nothing happens in what is kept
_LAST_S = 7.0  # that the end stays
_FRAME_S = 0.16  # what is printed within it is one frame
_COMMAND_S = 8.0  # what takes longer is shown faster
_LOOK_S = 0.02

Event = tuple[float, str]  # seconds, and what was printed then


class Terminal:
    """A shell in a pseudo-terminal, and all that it shows.

    Args:
        home: Its home and working directory.
        environment: Variables beside the usual ones.
    """

    def __init__(self, home: Path, **environment: str) -> None:
        variables = {
            **{name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ},
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PS1": SHELL_PROMPT,
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            **environment,
        }
        self.events: list[Event] = []
        self._ahead = ""  # shown behind what was awaited last
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._pid, self._handle = pty.fork()
        if self._pid == 0:
            os.chdir(home)
            shell = ["bash", "--noprofile", "--norc", "--noediting", "-i"]
            os.execvpe("bash", shell, variables)
        fcntl.ioctl(self._handle, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.until(PROMPT)

    def until(self, pattern: str, then_s: float = 0.0) -> None:
        """Go on when a pattern has been shown behind what was awaited last, and some seconds more.

        Raises:
            TimeoutError: It never was; the message has what was shown.
        """
        self.when(lambda: re.search(pattern, self._ahead) is not None, pattern)
        found = re.search(pattern, self._ahead)
        assert found is not None
        self._ahead = self._ahead[found.end() :]
        self.rest(then_s)

    def when(self, true: Callable[[], bool], what: str) -> None:
        """Go on when something is true.

        Raises:
            TimeoutError: It never was; the message has what was shown.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            self._read(_LOOK_S)
            if time.monotonic() > deadline:
                raise TimeoutError(f"awaited {what}, shown {self._ahead!r}")

    def rest(self, seconds: float) -> None:
        """Let time go by."""
        end = time.monotonic() + seconds
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
            self.rest(_KEY_S)

    def enter(self, line: str) -> None:
        """Type a line and run it."""
        self.press(line)
        self.rest(0.4)
        self.press("\r")

    def leave(self) -> None:
        """End the shell."""
        os.close(self._handle)  # which hangs up
        os.waitpid(self._pid, 0)


def frames(events: list[Event], first: int) -> list[Event]:
    """Events with times from 0, what belongs together joined, and nothing longer than needed.

    Args:
        events: As they happened.
        first: How many of them make the first frame, which so shows something.
    """
    joined: list[Event] = [(0.0, "".join(shown for _, shown in events[:first]))]
    for when, shown in _hurried(events[first - 1 :])[1:]:
        if when - joined[-1][0] < _FRAME_S:
            joined[-1] = (joined[-1][0], joined[-1][1] + shown)
        else:
            joined.append((when, shown))
    return [*joined, (joined[-1][0] + _LAST_S, "\x1b[0m")]  # an endless loop needs a pause


def _hurried(events: list[Event]) -> list[Event]:
    """From 0, without long waits, and with no command that runs for longer than `_COMMAND_S`."""
    parts: list[list[Event]] = [[]]
    last = events[0][0]
    for when, shown in events:  # the time since the event before
        if re.search(PROMPT, shown) or shown.startswith("\r\n"):
            parts.append([])
        parts[-1].append((min(when - last, _LONGEST_S), shown))
        last = when
    found, now = [], 0.0
    for part in parts:
        share = min(1.0, _COMMAND_S / max(1e-9, sum(pause for pause, _ in part)))
        for pause, shown in part:
            now += pause * share
            found.append((now, shown))
    return found


def write_cast(path: Path, shown: list[Event]) -> None:
    """A header, then a line an event."""
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "env": {"TERM": "xterm-256color"}}
    lines = [header, *([round(when, 3), "o", text] for when, text in shown)]
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )


def read_cast(path: Path) -> list[Event]:
    """The events of a file."""
    _, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(when, text) for when, kind, text in lines if kind == "o"]
