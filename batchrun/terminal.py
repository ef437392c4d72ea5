"""The one gate through which text leaves for a terminal.

Column names, file names, prompts, errors of libraries: any of it may hold what moves the cursor,
turns text around, or begins a line that looks like one of ours. Text is given to the gate by lines,
and each stays one line of visible characters, whatever is in it. Data (`--output -`) does not pass.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

MESSAGE = 2000  # characters of a line that is read as a message

# Controls, line separators, halves of surrogate pairs, what is invisible, and what turns text
# around (Boucher and Anderson, "Trojan Source", 2021). Joiners stay between characters beyond
# ASCII: emoji and several scripts need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff"
    "\uffa0\ufff9-\ufffb\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)


def printable(text: object, limit: int | None = None) -> str:
    """Text as one line in which all is visible: what is not is escaped as Python would.

    Args:
        text: Any text, or what becomes it by `str`.
        limit: Characters; of longer text the middle is left out.
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
) -> None:
    """Print lines, each of which stays one.

    Args:
        lines: The lines.
        err: To stderr instead of stdout.
        stream: To another stream.
        write: Prints a line, as `print` does.
        limit: As of `printable`.
    """
    stream = stream or (sys.stderr if err else sys.stdout)
    if stream is None:  # closed before the process began
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        shown = printable(line, limit).encode(encoding, "backslashreplace").decode(encoding)
        write(shown, file=stream)
    stream.flush()


def tell(*lines: str) -> None:
    """Print lines that are no answer: messages and errors, on stderr."""
    say(*lines, err=True, limit=MESSAGE)


def say_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON, which has an escape for all that is not ASCII."""
    text = json.dumps(value, indent=indent).replace("\x7f", r"\u007f")
    say(*text.split("\n"))


def guard_libraries() -> None:
    """Let what libraries warn of and log pass the gate too: it may quote a model's files."""
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
