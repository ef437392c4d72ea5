"""Makes objects, in a process of its own: `python -m batchrun.objectstore.upload`."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn, cast

from batchrun import children
from batchrun.objectstore.client import asked, said, stat_object, system_of
from batchrun.objectstore.paths import ObjectPath, StoreError, advice

_BLOCK = 1 << 23


def upload(file: Path, to: ObjectPath) -> None:
    """Make an object of a file's bytes; it is there whole or not at all.

    Raises:
        StoreError: It can't be made.
    """
    size = file.stat().st_size

    def put() -> None:
        with file.open("rb") as source:
            _elsewhere("put", str(size), to, source)

    asked(to, put)
    if (now := stat_object(to).size) != size:
        raise StoreError(f"{to} has {now:,} bytes after {size:,} were written")


def probe(path: ObjectPath) -> None:
    """Prove that objects can be made beside this one, by making one and removing it.

    Raises:
        StoreError: None can.
    """
    try:
        _elsewhere("probe", os.urandom(4).hex(), path, io.BytesIO())
    except OSError as error:
        raise StoreError(str(error), advice(path.scheme)) from error


def _elsewhere(what: str, how: str, path: ObjectPath, source: IO[bytes]) -> None:
    """Write to a store in another process.

    Arrow completes an object when its stream is closed, and closes it when an exception unwinds.
    Only if the process ends, and it is killed when one is raised here, is nothing there.
    """
    program = children.command(what, how, path.url, module="batchrun.objectstore.upload")
    with (
        tempfile.TemporaryFile() as heard,
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stderr=heard, **children.inheriting()
        ) as process,
    ):
        try:
            with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as pipe:
                shutil.copyfileobj(source, pipe, _BLOCK)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        if code:
            heard.seek(0)
            lines = heard.read().decode(errors="replace").strip().splitlines()
            raise OSError(lines[-1] if lines else f"exit code {code}")


def _put(size: str, path: ObjectPath) -> None:
    system, place = system_of(path)
    out, left = system.open_output_stream(place, compression=None), int(size)
    while data := sys.stdin.buffer.read(_BLOCK):
        out.write(data)
        left -= len(data)
    if left:  # whoever sends it is gone
        os._exit(1)
    out.close()


def _probe(mark: str, path: ObjectPath) -> None:
    system, place = system_of(ObjectPath(f"{path}.probe-{mark}"))
    system.open_output_stream(place, compression=None).close()
    with suppress(OSError):  # who may write may not always delete
        system.delete_file(place)


def main(what: str, how: str, url: str) -> NoReturn:
    """What `upload` and `probe` run; see `_elsewhere`."""
    code = 1
    try:
        {"put": _put, "probe": _probe}[what](how, ObjectPath(url))
        code = 0
    except Exception as error:  # clients raise errors of their own
        os.write(2, said(error).encode(errors="replace"))  # to `_elsewhere`
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
