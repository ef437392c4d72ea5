"""`-` as an input and as an output: a pipe is read to its end first, since a job may be resumed."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.formats import sniffed
from batchrun.options import PIPE
from batchrun.submission import kept_input


@contextmanager
def taken_in(inputs: Sequence[str], root: Path) -> Iterator[tuple[list[str], Path | None]]:
    """If `-` is among the inputs, keep stdin in a file until the block ends.

    Args:
        inputs: What a user named.
        root: What `home()` returns.

    Yields:
        The inputs, and that file; None if there is no `-`.

    Raises:
        InputError: Nothing is piped in, or nothing that can be read.
        OutputError: It can't be kept.
    """
    if PIPE not in inputs:
        yield list(inputs), None
        return
    if len(inputs) > 1:
        raise click.UsageError("- reads the whole input from stdin: leave out the other inputs")
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("nothing is piped into stdin", hint="batchrun submit - < prompts.jsonl")

    def copy(file: BinaryIO) -> None:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)

    try:
        with kept_input(root, "stdin", copy, _kind) as path:
            yield [str(path)], path
    except InputError as error:  # the file's name means nothing to the user
        folder = re.escape(f"{root / 'jobs'}/")
        name = r"\.stdin-\w{8}\.\w+"
        message = re.sub(folder + name, "the data on stdin", str(error))
        hint = re.sub(f"({folder})?{name}", "FILE", error.hint or "")
        raise InputError(re.sub(name, "stdin", message), hint or None) from error


def _kind(path: Path) -> str:
    if not path.stat().st_size:
        raise InputError("stdin is empty", hint="check the command that writes to the pipe")
    kind = sniffed(path)
    if kind is None:
        raise InputError(
            "the data on stdin is neither JSON nor Parquet nor CSV with a header",
            hint="save it to a file with the ending of its format, such as rows.jsonl",
        )
    return kind.suffixes[0]


def hand_out(path: Path) -> None:
    """Write a file to stdout.

    Raises:
        BrokenPipeError: Its reader is gone.
    """
    with path.open("rb") as file:
        pour(file)


def pour(data: BinaryIO) -> None:
    """Write data to stdout as they are.

    Raises:
        BrokenPipeError: Its reader is gone.
    """
    shutil.copyfileobj(data, sys.stdout.buffer, 1 << 20)
    sys.stdout.buffer.flush()
