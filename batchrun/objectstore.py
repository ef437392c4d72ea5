"""Files that are objects in a store, named by URL: `s3://bucket/rows.parquet`.

Arrow's own clients speak to S3 (and whatever speaks its protocol), Google Cloud Storage, Azure and
HDFS; for any other URL the package that fsspec knows for it, such as Hugging Face's for `hf://`.
They find credentials, regions and endpoints as each store's own tools do.

Importing this module does not load Arrow.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import has_magic
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, TypeVar
from urllib.parse import unquote

from batchrun.errors import UserError, first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

T = TypeVar("T")

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://([^/]*)/?(.*)", re.DOTALL)
_ARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_PATIENCE_S = 300.0  # a store that has answered before may be silent for so long
_REFUSED = re.compile(r"access.?denied|permission.?denied|forbidden|unauthorized|no_such_", re.I)
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_AHEAD, _MOST_AHEAD = 1 << 18, 1 << 23  # bytes that are read with those asked for
_BLOCK = 1 << 23

_ADVICE = {
    "s3": "who you are there, and where it is, say AWS_PROFILE or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL",
    "gs": "who you are there says: gcloud auth application-default login",
    "abfs": "who you are there says: az login",
    "hf": "who you are there says: hf auth login",
    "http": "curl -L 'URL' | batchrun submit - reads rows from any address",
}


class StoreError(UserError, OSError):
    """An object store refuses, or does not answer."""


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """An object, or all objects beneath a name, with the names of pathlib's attributes.

    Args:
        url: As the user wrote it, without a `/` at its end. Nothing in it is escaped.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """Which kind of store it is in."""
        return self.url.partition("://")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The bucket, and what its slashes divide the name into."""
        return tuple(part for part in self.url.partition("://")[2].split("/") if part)

    @property
    def name(self) -> str:
        """The last of its parts."""
        return self.parts[-1]

    @property
    def suffix(self) -> str:
        """The end of its name, from the last dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """Its name without that."""
        return PurePosixPath(self.name).stem

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}")


Location: TypeAlias = Path | ObjectPath  # of a file here, or in a store


def location(name: str) -> Location:
    """Where a path or URL leads; `~` is the user's home folder.

    Raises:
        StoreError: The URL names nothing, or holds a password, which would be kept with the job.
    """
    found = _URL.fullmatch(name)
    if found is None:
        return Path(name).expanduser()
    scheme, host, key = found.groups()
    if scheme == "file":
        return Path("/", unquote(key))
    if not host and not key:
        raise StoreError(f"{name} names no object", "such a name is like s3://bucket/rows.parquet")
    user, at, rest = host.rpartition("@")
    if at and ":" in user:
        raise StoreError(
            f"{scheme}://...@{rest}/{key} holds a password, which would be kept with the job",
            _advice(scheme),
        )
    return ObjectPath(name.rstrip("/"))


def inside(folder: Path, name: str) -> Location:
    """Where a path or URL leads from a folder."""
    found = location(name)
    return found if isinstance(found, ObjectPath) else folder / found


def moved(path: str, old: Location, new: Location) -> str | None:
    """A path or URL after what is in `old` has moved to `new`; None if it is not in `old`."""
    if path == str(old):
        return str(new)
    folder = f"{str(old).rstrip('/')}/"
    return str(new / path[len(folder) :]) if path.startswith(folder) else None


class ObjectStat(NamedTuple):
    """An object as it is now.

    Args:
        size: In bytes.
        tag: Distinguishes its content from any other; the store's word for it.
    """

    size: int
    tag: int


def stat_object(path: ObjectPath) -> ObjectStat:
    """An object's size and tag.

    Raises:
        FileNotFoundError: There is no such object.
        StoreError: The store does not say.
    """
    return _asked(path, lambda: _opened(path)[1])


def beneath(path: ObjectPath) -> list[ObjectPath] | None:
    """What is in a folder and the folders in it, in order; None if it is an object.

    Raises:
        FileNotFoundError: There is neither.
        StoreError: The store does not say.
    """
    from pyarrow.fs import FileType  # noqa: PLC0415 - Arrow, seldom

    def find() -> FileInfo:
        system, place = _system(path)
        return system.get_file_info([place])[0]

    kind = _asked(path, find).type
    if kind == FileType.NotFound:
        raise FileNotFoundError(f"{path}: there is no such object")
    if kind == FileType.File:
        return None
    return sorted((found for found, info in _listed(path) if info.type == FileType.File), key=str)


def matching(pattern: ObjectPath) -> list[ObjectPath]:
    """Objects and folders that match a pattern, in order; `**` is any number of folders.

    Raises:
        StoreError: The store does not say.
    """
    from fsspec.utils import glob_translate  # noqa: PLC0415 - seldom

    fixed, _, rest = pattern.url.partition("://")
    names = rest.split("/")
    first = next(i for i, name in enumerate(names) if has_magic(name))
    folder = ObjectPath(f"{fixed}://{'/'.join(names[:first])}")
    # `**` is folders if it is all of a name, as in Python's glob.
    wanted = [name if name == "**" else re.sub(r"\*+", "*", name) for name in names[first:]]
    match = re.compile(glob_translate("/".join(wanted)))
    deep = first + 1 < len(names)
    begin = len(folder.url) + 1
    return sorted(
        (
            found
            for found, _ in _listed(folder, deep=deep)
            if match.match(found.url[begin:]) and not found.name.startswith(".")
        ),
        key=str,
    )


def sizes(path: ObjectPath) -> dict[ObjectPath, ObjectStat]:
    """All objects beneath a folder, with what a list says of them.

    Raises:
        StoreError: The store does not say.
    """
    from pyarrow.fs import FileType  # noqa: PLC0415 - Arrow, seldom

    return {
        found: ObjectStat(info.size or 0, info.mtime_ns or 0)
        for found, info in _listed(path)
        if info.type == FileType.File
    }


class ObjectFile(io.RawIOBase):
    """An object's bytes, seekable. Waits for a store that falls silent, and asks again.

    Args:
        path: The object.

    Raises:
        FileNotFoundError: There is no such object.
        StoreError: The store does not answer, or the object was replaced while it was read.
    """

    def __init__(self, path: ObjectPath) -> None:
        super().__init__()
        self._path, self._at = path, 0
        self._begin, self._block, self._ahead = 0, memoryview(b""), _AHEAD
        self._file, self._stat = _asked(path, lambda: _opened(path))

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def size(self) -> int:
        """In bytes."""
        return self._stat.size

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read from there on."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stat.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, whole unless the object ends."""
        into, done = memoryview(buffer).cast("B"), 0
        while done < len(into) and self._at < self._stat.size:
            within = self._at - self._begin
            if not 0 <= within < len(self._block):
                # Reading on from there is likely to go on: a request takes long, whatever its size.
                goes_on = within == len(self._block) > 0
                self._ahead = min(2 * self._ahead, _MOST_AHEAD) if goes_on else _AHEAD
                size = min(max(len(into) - done, self._ahead), self._stat.size - self._at)
                self._block = memoryview(_asked(self._path, partial(self._fetched, size)))
                self._begin, within = self._at, 0
            part = self._block[within : within + len(into) - done]
            into[done : done + len(part)] = part
            self._at, done = self._at + len(part), done + len(part)
        return done

    def _fetched(self, size: int) -> bytes:
        """That many bytes from where it is."""
        if self._file is None:
            file, now = _opened(self._path)
            if now != self._stat:
                raise StoreError(f"{self._path} was replaced while it was read")
            self._file = file
        try:
            data: bytes = self._file.read_at(size, self._at)
        except BaseException:
            self._file = None
            raise
        if len(data) < size:
            self._file = None
            raise OSError(f"{self._path} ended {size - len(data):,} bytes early")
        return data


def download(path: ObjectPath, to: Path) -> None:
    """Write an object's bytes to a file, which must be new.

    Raises:
        OSError: The file can't be written.
        StoreError: The store does not answer, or the object was replaced in the meantime.
    """
    with ObjectFile(path) as source, to.open("xb") as file:
        while data := source.read(_BLOCK):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def upload(file: Path, to: ObjectPath) -> None:
    """Make an object of a file's bytes; it is there whole or not at all.

    Raises:
        StoreError: It can't be made.
    """
    _asked(to, lambda: _elsewhere("put", str(file), to))
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
        raise StoreError(f"{path} can't be written: {error}", _advice(path.scheme)) from error


def _elsewhere(what: str, how: str, path: ObjectPath) -> None:
    """Write to a store in another process.

    Arrow completes an object when its stream is closed, and closes it when an exception unwinds.
    Only if the process ends, and `subprocess.run` kills it when one is raised here, is nothing
    there.
    """
    done = subprocess.run(
        [sys.executable, "-m", "batchrun.objectstore", what, how, path.url, str(os.getpid())],
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
    system, place = _system(path)
    with open(file, "rb") as source:
        out = system.open_output_stream(place)
        while data := source.read(_BLOCK):
            if os.getppid() != parent:  # nobody waits for it: it may be out of date
                os._exit(1)
            out.write(data)
        out.close()


def _probe(mark: str, path: ObjectPath, _: int) -> None:
    system, place = _system(ObjectPath(f"{path}.probe-{mark}"))
    system.open_output_stream(place).close()
    with suppress(OSError):  # who may write may not always delete
        system.delete_file(place)


def main(what: str, how: str, url: str, parent: str) -> NoReturn:
    """What `upload` and `probe` run; see `_elsewhere`."""
    code = 1
    try:
        {"put": _put, "probe": _probe}[what](how, ObjectPath(url), int(parent))
        code = 0
    except Exception as error:  # clients raise errors of their own
        print(first_line(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


# --- asking a store ---

_answered: set[str] = set()  # beginnings of URLs of stores that have answered


def _asked(path: ObjectPath, ask: Callable[[], T]) -> T:
    """What a store answers. One that has answered before is asked again until it does."""
    store = path.url.partition("://")[0] + path.parts[0]
    pause, began = _PAUSE_S, time.monotonic()
    while True:
        try:
            found = ask()
        except (FileNotFoundError, StoreError):
            raise
        except (ImportError, ValueError) as error:  # no client for it, or no such name
            raise _unusable(path, error) from error
        except Exception as error:  # clients raise errors of their own
            patience = _PATIENCE_S if store in _answered and not _REFUSED.search(str(error)) else 0
            if time.monotonic() - began >= patience:
                raise StoreError(f"{path}: {first_line(error)}", _advice(path.scheme)) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            _answered.add(store)
            return found


def _unusable(path: ObjectPath, error: Exception) -> StoreError:
    if isinstance(error, ImportError):
        return StoreError(f"{path} needs a package: {first_line(error)}", _advice(path.scheme))
    if "Protocol not known" in str(error):
        known = ", ".join(f"{scheme}://" for scheme in (*_ARROW[:2], *_ARROW[3:5], "hf"))
        return StoreError(
            f"{path}: there is no store {path.scheme}://",
            f"there are {known}, and those of fsspec's packages",
        )
    return StoreError(f"{path}: {first_line(error)}", _advice(path.scheme))


def _advice(scheme: str) -> str | None:
    return next((said for kind, said in _ADVICE.items() if scheme.startswith(kind)), None)


@lru_cache
def _arrow_system(store: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem  # noqa: PLC0415 - Arrow, seldom

    return FileSystem.from_uri(store)


def _system(path: ObjectPath) -> tuple[FileSystem, str]:
    """The client for a store, and what it calls the object."""
    scheme, host, key = _URL.fullmatch(path.url).groups()  # type: ignore[union-attr]
    if scheme in _ARROW:
        system, root = _arrow_system(f"{scheme}://{host}")
        return system, f"{root.rstrip('/')}/{key}".rstrip("/")
    from pyarrow.fs import FileSystem  # noqa: PLC0415 - Arrow, seldom

    return FileSystem.from_uri(path.url if scheme == "hf" else f"fsspec+{path}")


def _listed(path: ObjectPath, *, deep: bool = True) -> Iterator[tuple[ObjectPath, FileInfo]]:
    """What is beneath a folder; nothing if there is no such folder."""
    from pyarrow.fs import FileSelector  # noqa: PLC0415 - Arrow, seldom

    def find() -> tuple[str, list[FileInfo]]:
        system, place = _system(path)
        asked = FileSelector(place, allow_not_found=True, recursive=deep)
        return place, system.get_file_info(asked)

    place, infos = _asked(path, find)
    for info in infos:
        yield ObjectPath(path.url + info.path[len(place) :]), info


def _opened(path: ObjectPath) -> tuple[Any, ObjectStat]:
    """An open object, and what it is now."""
    system, place = _system(path)
    file = system.open_input_file(place)
    words = {str(name).lower(): value for name, value in (file.metadata() or {}).items()}
    tag = words.get("etag")
    if tag is None and hasattr(system, "handler"):
        system.handler.fs.invalidate_cache()
        tag = system.handler.fs.ukey(place).encode()
    if tag is None:
        tag = str(system.get_file_info([place])[0].mtime_ns).encode()
    digest = blake2b(bytes(tag), digest_size=7).digest()  # which every JSON reader keeps exact
    return file, ObjectStat(file.size(), int.from_bytes(digest, "little"))


if __name__ == "__main__":
    main(*sys.argv[1:])
