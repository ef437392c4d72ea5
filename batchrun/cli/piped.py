"""`-` as an input and as an output: a pipe is read to its end first, since a job may be resumed."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from batchrun.jobs.errors import ROOM, InputError, OutputError, refused
from batchrun.jobs.output.destination import one_at_a_time
from batchrun.jobs.rows.formats import sniffed

PIPE = "-"


@contextmanager
def taken_in(inputs: Sequence[str], root: Path) -> Iterator[tuple[list[str], Path | None]]:
    """Where `-` is among the inputs, what comes in on stdin as a file, until the block ends.

    Args:
        inputs: What a user named.
        root: What `home()` says.

    Yields:
        The inputs, and that file; None where there is no `-`.

    Raises:
        InputError: Nothing is piped in, or nothing that can be read.
        OutputError: It can't be kept.
    """
    if PIPE not in inputs:
        yield list(inputs), None
        return
    if len(inputs) > 1:
        raise click.UsageError("- is the whole input: name it alone")
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("nothing is piped in", hint="batchrun submit - < prompts.jsonl")
    folder = root / "jobs"
    with _room(folder), one_at_a_time(root):  # nobody sweeps it away before it is locked
        handle, name = tempfile.mkstemp(prefix=".stdin-", suffix=".tmp", dir=folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    path = Path(name)
    try:
        with _room(folder), os.fdopen(handle, "wb", closefd=False) as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        if not path.stat().st_size:
            raise InputError("nothing came in on stdin", hint="look at what writes into the pipe")
        kind = sniffed(path)
        if kind is None:
            raise InputError(
                "what came in on stdin is neither JSON nor Parquet nor CSV with a header",
                hint="write it to a file whose name says what it is",
            )
        # Its name is that of the job, and its suffix says how to read it.
        named = path.rename(path.with_name(f"{path.stem}{kind.suffixes[0]}"))
        path = named
        yield [str(named)], named
    except InputError as error:  # nobody else knows the file
        message = str(error).replace(str(path), "what came in on stdin")
        hint = (error.hint or "").replace(str(path), "FILE").replace(path.name, "FILE")
        raise InputError(message.replace(path.name, "stdin"), hint or None) from error
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def hand_out(path: Path, to: BinaryIO | None = None) -> None:
    """Write a file to stdout.

    Raises:
        BrokenPipeError: Its reader is gone.
    """
    out = to or sys.stdout.buffer
    with path.open("rb") as file:
        shutil.copyfileobj(file, out, 1 << 20)
    out.flush()


def _room(folder: Path) -> AbstractContextManager[None]:
    return refused(OutputError, f"stdin can't be kept in {folder}", ROOM)
