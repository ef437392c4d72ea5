"""What a job needs from the place where its output is: here, the local file system."""

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
    """Files that appear whole or not at all: here, on this machine.

    Only the store interprets paths. A store for another place would have the same methods.
    """

    def check(self, path: Path, *, overwrite: bool) -> None:
        """Prove that a file can be written there, by writing one beside it and removing it.

        Raises:
            OutputError: It can't, or it exists and may not be replaced.
        """
        # `os.path`, because pathlib raises if a folder on the way may not be entered.
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
        """See `atomic_write`; `sweep` removes what a killed process leaves."""
        return atomic_write(path, may_replace=may_replace, private=private)

    def disk(self, path: Path) -> Disk:
        """The disk that a file is on, or will be on."""
        return disk_of(path)

    def sweep(self, path: Path) -> None:
        """Remove what dead writers left beside a file."""
        remove_abandoned(path)

    def identity(self, path: Path) -> Identity | None:
        """What distinguishes a file from any other that takes its place; None if there is none."""
        try:
            return identity_of(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def places(self, path: Path) -> set[str | tuple[object, ...]]:
        """What identifies a file: paths with one of these in common lead, or would, to one file.

        These are its path without links, its inode, and its name with its folder's inode.
        """
        real = os.path.realpath(path)
        found: set[str | tuple[object, ...]] = {real}
        for where, name in ((real, ()), (os.path.dirname(real), (os.path.basename(real),))):
            try:
                stat = os.stat(where)
            except OSError:  # it doesn't exist, or may not be inspected
                continue
            found.add((stat.st_dev, stat.st_ino, *name))
        return found


OUTPUTS = OutputStore()
