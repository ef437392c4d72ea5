"""Results beside their input rows, in input order, as a file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from batchrun.jobs.errors import OutputError, OutputTaken, cause_of
from batchrun.jobs.files import MayReplace
from batchrun.jobs.output.joined import Joined
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.formats import FORMATS
from batchrun.objectstore.paths import Location

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_columns(column_names: Sequence[str], added: Iterable[str]) -> None:
    """Refuse an input that has a column the output adds: see `output_columns`.

    Raises:
        OutputError: It has such a column; the message names it.
    """
    clash = [name for name in added if name in column_names]
    if clash:
        names = ", ".join(f"'{name}'" for name in clash)
        raise OutputError(
            f"the input has {'columns' if len(clash) > 1 else 'a column'} {names}, "
            "which the output adds",
            hint=f"rename columns in the input, for example '{clash[0]}' to 'input_{clash[0]}', or "
            "give the added columns a prefix: --output-prefix new_",
        )


def export(
    joined: Joined,
    destination: Location,
    *,
    format: str,  # noqa: A002 - the field's word
    may_replace: MayReplace = lambda _: True,
    private: bool = False,
) -> int:
    """Write an output file.

    Each row is written once per sample. Memory does not grow with the number of rows. An input
    column with an added column's name, which in JSON Lines may first appear after the rows that
    `check_columns` saw, is kept as `input_<name>`.

    Args:
        joined: Its rows.
        destination: The file.
        format: Its format's name in `FORMATS`.
        may_replace: Whether the finished file may replace what is there; see `OutputStore`.
        private: Nobody else may ever read it.

    Returns:
        The number of rows written.

    Raises:
        OutputTaken: A file appeared there in the meantime that it may not replace.
        OutputError: The file can't be written. What was there before is unchanged.
        InputError: The input can't be read any more.
        JobError: From `joined`.
    """
    try:
        with OUTPUTS.write(destination, may_replace=may_replace, private=private) as file:
            FORMATS[format].write(file, joined, destination)
            joined.finish()
    except FileExistsError as error:
        raise OutputTaken(
            f"{destination} was written by another program in the meantime; "
            "the results are safe in the job",
            hint="batchrun export --output OTHER",
        ) from error
    except (OSError, pa.ArrowException) as error:
        code = error.errno if isinstance(error, OSError) else None
        cause = str(error) if code is None else os.strerror(code)
        if isinstance(error, OSError) and isinstance(destination, Path):
            cause = cause_of(error, destination.parent)
        advice = "make room on the disk, then" if code in _NO_ROOM else "once that is fixed"
        raise OutputError(
            f"{destination} can't be written: {cause}; the results are safe in the job",
            hint=f"{advice}: batchrun export",
        ) from error
    return joined.count
