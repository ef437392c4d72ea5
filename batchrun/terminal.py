"""The one gate through which all text goes to a terminal.

Column names, file names, prompts, library errors: any of them may hold text that moves the cursor,
reverses text, or fakes a line of ours. Text enters the gate line by line, and each line leaves as
one line of visible characters, whatever is in it. Data (`--output -`) bypass the gate.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

MESSAGE = 2000  # characters of a line that is read as a message

# Controls, line separators, lone surrogates, invisible characters, and those that reverse text
# (Boucher and Anderson, "Trojan Source", 2021). Joiners stay between non-ASCII characters: emoji
# and several scripts need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    "\uffa0\ufff9-\ufffb\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)


def printable(text: object, limit: int | None = None) -> str:
    """Text as one line of visible characters, others escaped as in Python.

    Args:
        text: Any text, or an object to convert by `str`.
        limit: Maximum number of characters; longer text loses its middle.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        kept = limit // 2
        left_out = f" ... {len(text) - 2 * kept:,} characters ... "
        text = f"{text[:kept]}{left_out}{text[-kept:]}"
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(
    *lines: str,
    err: bool = False,
    stream: TextIO | None = None,
    write: Callable[..., object] = print,
    limit: int | None = None,
    paint: Callable[[str], str] = str,
) -> None:
    """Print lines, each of which stays one line.

    Args:
        lines: The lines.
        err: To stderr instead of stdout.
        stream: To another stream.
        write: Prints a line, as `print` does.
        limit: See `printable`.
        paint: Adds colours to a line that has passed the gate.
    """
    stream = stream or (sys.stderr if err else sys.stdout)
    if stream is None:  # closed before the process began
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        shown = printable(line, limit).encode(encoding, "backslashreplace").decode(encoding)
        write(paint(shown), file=stream)
    stream.flush()


def redraws(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def tell(*lines: str) -> None:
    """Print messages and errors to stderr."""
    say(*lines, err=True, limit=MESSAGE)


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON, with everything beyond ASCII escaped."""
    text = json.dumps(value, indent=indent).replace("\x7f", r"\u007f")
    say(*text.split("\n"))


def guard_libraries() -> None:
    """Send libraries' warnings and logs through the gate too: they may quote a model's files."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 - the library's name
        return printable(super().getMessage(), MESSAGE)


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return printable(f"{filename}:{lineno}: {category.__name__}: {message}", MESSAGE) + "\n"
