"""Makes objects, in a process of its own: `python -m batchrun.objectstore.upload`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from batchrun.objectstore.client import asked, said, stat_object, system_of
from batchrun.objectstore.paths import ObjectPath, StoreError, advice

_BLOCK = 1 << 23


def upload(file: Path, to: ObjectPath) -> None:
    """Make an object of a file's bytes; it is there whole or not at all.

    Raises:
        StoreError: It can't be made.
    """
    asked(to, lambda: _elsewhere("put", str(file), to))
    if (now := stat_object(to).size) != (size := file.stat().st_size):
        raise StoreError(f"{to} has {now:,} bytes after {size:,} were written")


def probe(path: ObjectPath) -> None:
    """Prove that objects can be made beside this one, by making one and removing it.

    Raises:
        StoreError: None can.
    """
    try:
        _elsewhere("probe", os.urandom(4).hex(), path)
    except OSError as error:
        raise StoreError(str(error), advice(path.scheme)) from error


def _elsewhere(what: str, how: str, path: ObjectPath) -> None:
    """Write to a store in another process.

    Arrow completes an object when its stream is closed, and closes it when an exception unwinds.
    Only if the process ends, and `subprocess.run` kills it when one is raised here, is nothing
    there.
    """
    program = [sys.executable, "-m", "batchrun.objectstore.upload"]
    done = subprocess.run(
        [*program, what, how, path.url, str(os.getpid())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(said[-1])


def _put(file: str, path: ObjectPath, parent: int) -> None:
    system, place = system_of(path)
    with open(file, "rb") as source:
        out = system.open_output_stream(place, compression=None)  # not by the name's suffix
        while data := source.read(_BLOCK):
            if os.getppid() != parent:  # nobody waits for it: it may be out of date
                os._exit(1)
            out.write(data)
        out.close()


def _probe(mark: str, path: ObjectPath, _: int) -> None:
    system, place = system_of(ObjectPath(f"{path}.probe-{mark}"))
    system.open_output_stream(place, compression=None).close()
    with suppress(OSError):  # who may write may not always delete
        system.delete_file(place)


def main(what: str, how: str, url: str, parent: str) -> NoReturn:
    """What `upload` and `probe` run; see `_elsewhere`."""
    code = 1
    try:
        {"put": _put, "probe": _probe}[what](how, ObjectPath(url), int(parent))
        code = 0
    except Exception as error:  # clients raise errors of their own
        print(said(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
