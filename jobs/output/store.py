"""What a job needs of the place where an output lies: here the local file system."""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from batchrun.jobs.errors import OutputError, refused
from batchrun.jobs.files import (
    Disk,
    Identity,
    MayReplace,
    atomic_write,
    disk_of,
    identity_of,
    remove_abandoned,
)


class OutputStore:
    """Files that appear whole or not at all: here on this machine.

    A path is a name; only the store looks behind it. One for another place has the same methods.
    """

    def check(self, path: Path, *, overwrite: bool) -> None:
        """Prove that a file can be written there, by writing one beside it and removing it.

        Raises:
            OutputError: It can't, or it exists and is not to be replaced.
        """
        # `os.path` because pathlib raises where a folder on the way may not be entered.
        if os.path.isdir(path):
            raise OutputError(f"{path} is a folder", hint=f"--output '{path / 'output.parquet'}'")
        if os.path.lexists(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise OutputError(f"{path} is not a regular file", hint="choose another --output")
            if not overwrite:
                raise OutputError(
                    f"{path} exists already", hint="--overwrite to replace it, or another --output"
                )
        parent = path.absolute().parent
        if not os.path.exists(parent):
            raise OutputError(f"{path}: there is no folder {parent}", hint=f"mkdir -p '{parent}'")
        advice = f"choose another --output, or see: ls -ld '{parent}'"
        with refused(OutputError, f"{path} can't be written", advice):
            tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name}.", suffix=".tmp").close()

    def write(
        self, path: Path, *, may_replace: MayReplace, private: bool
    ) -> AbstractContextManager[IO[bytes]]:
        """See `atomic_write`; what it leaves when its process is killed `sweep` removes."""
        return atomic_write(path, may_replace=may_replace, private=private)

    def disk(self, path: Path) -> Disk:
        """How much room there is where a file is, or will be."""
        return disk_of(path)

    def sweep(self, path: Path) -> None:
        """Remove what dead writers left beside a file."""
        remove_abandoned(path)

    def identity(self, path: Path) -> Identity | None:
        """What tells a file from any other that takes its place; None where there is none."""
        try:
            return identity_of(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def places(self, path: Path) -> set[str | tuple[object, ...]]:
        """By what a file is known: paths are of one, or would be, where they have one in common.

        Its path without links, its inode, its name in its folder's inode.
        """
        real = os.path.realpath(path)
        found: set[str | tuple[object, ...]] = {real}
        for where, name in ((real, ()), (os.path.dirname(real), (os.path.basename(real),))):
            try:
                stat = os.stat(where)
            except OSError:  # it is not there, or nobody may look
                continue
            found.add((stat.st_dev, stat.st_ino, *name))
        return found


OUTPUTS = OutputStore()
