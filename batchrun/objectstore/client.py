"""Asks object stores, through Arrow's clients or fsspec's packages.

Arrow's own clients speak to S3 (and whatever speaks its protocol), Google Cloud Storage, Azure and
HDFS; for any other URL the package that fsspec knows for it, such as Hugging Face's for `hf://`.
They find credentials, regions and endpoints as each store's own tools do.

Importing this module does not load Arrow.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from glob import has_magic
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from batchrun.errors import first_line
from batchrun.objectstore.paths import URL, ObjectPath, StoreError, advice

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

T = TypeVar("T")

_ARROW = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
# Google's client asks again for 15 minutes.
_OPTIONS = dict.fromkeys(("gs", "gcs"), "/?retry_limit_seconds=15")
_PATIENCE_S = 300.0  # a store that has answered before may be silent for so long
_REFUSED = re.compile(r"access.?denied|permission.?denied|forbidden|unauthorized|no_such_", re.I)
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


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
    return asked(path, lambda: opened(path)[1])


def beneath(path: ObjectPath) -> list[ObjectPath] | None:
    """What is in a folder and the folders in it, in order; None if it is an object.

    Raises:
        FileNotFoundError: There is neither.
        StoreError: The store does not say.
    """
    from pyarrow.fs import FileType  # noqa: PLC0415 - Arrow, seldom

    def find() -> FileInfo:
        system, place = system_of(path)
        return system.get_file_info([place])[0]

    kind = asked(path, find).type
    if kind == FileType.NotFound:
        raise FileNotFoundError(f"{path}: there is no such object")
    if kind == FileType.File:
        return None
    return sorted((found for found, info in _listed(path) if info.type == FileType.File), key=str)


def matching(pattern: ObjectPath) -> list[tuple[ObjectPath, bool]]:
    """What matches a pattern, in order, and whether it is a folder.

    `**` is any number of folders.

    Raises:
        StoreError: The store does not say.
    """
    from fsspec.utils import glob_translate  # noqa: PLC0415 - seldom
    from pyarrow.fs import FileType  # noqa: PLC0415 - Arrow, seldom

    fixed, _, rest = pattern.url.partition("://")
    names = rest.split("/")
    first = next(i for i, name in enumerate(names) if has_magic(name))
    if first == 0:
        raise StoreError(
            f"{pattern}: the bucket's name is part of the pattern", "name one bucket in full"
        )
    folder = ObjectPath(f"{fixed}://{'/'.join(names[:first])}")
    # `**` is folders if it is all of a name, as in Python's glob.
    wanted = [name if name == "**" else re.sub(r"\*+", "*", name) for name in names[first:]]
    match = re.compile(glob_translate("/".join(wanted)))
    deep = first + 1 < len(names)
    begin = len(folder.url) + 1
    return sorted(
        (
            (found, info.type == FileType.Directory)
            for found, info in _listed(folder, deep=deep)
            if match.match(found.url[begin:]) and not found.name.startswith(".")
        ),
        key=lambda matched: matched[0].url,
    )


# --- asking a store ---

_answered: set[tuple[str, str]] = set()  # schemes and buckets


def asked(path: ObjectPath, ask: Callable[[], T]) -> T:
    """What a store answers. One that has answered before is asked again until it does."""
    store = path.scheme, path.parts[0]
    pause, since = _PAUSE_S, None
    while True:
        try:
            found = ask()
        except (FileNotFoundError, StoreError):
            raise
        except (ImportError, ValueError) as error:  # no client for it, or no such name
            raise _unusable(path, error) from error
        except Exception as error:  # clients raise errors of their own
            patience = _PATIENCE_S if store in _answered and not _REFUSED.search(str(error)) else 0
            since = time.monotonic() if since is None else since  # the first failure
            if time.monotonic() - since >= patience:
                raise StoreError(f"{path}: {said(error)}", advice(path.scheme)) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            _answered.add(store)
            return found


def _unusable(path: ObjectPath, error: Exception) -> StoreError:
    if isinstance(error, ImportError):
        return StoreError(f"{path} needs a package: {said(error)}", advice(path.scheme))
    if "Protocol not known" in str(error):
        known = ", ".join(f"{scheme}://" for scheme in (*_ARROW[:2], *_ARROW[3:5], "hf"))
        return StoreError(
            f"{path}: there is no store {path.scheme}://",
            f"known stores: {known}, and those of fsspec's packages",
        )
    return StoreError(f"{path}: {said(error)}", advice(path.scheme))


def said(error: Exception) -> str:
    """An error's message without what only its store's makers read."""
    return re.split(r" \(Request ID| error_info=", first_line(error))[0]


@lru_cache
def _arrow_system(store: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem  # noqa: PLC0415 - Arrow, seldom

    return FileSystem.from_uri(store + _OPTIONS.get(store.partition("://")[0], ""))


def system_of(path: ObjectPath) -> tuple[FileSystem, str]:
    """The client for a store, and what it calls the object."""
    scheme, host, key = URL.fullmatch(path.url).groups()  # type: ignore[union-attr]
    if scheme in _ARROW:
        system, root = _arrow_system(f"{scheme}://{host}")
        return system, f"{root.rstrip('/')}/{key}".rstrip("/")
    from pyarrow.fs import FileSystem  # noqa: PLC0415 - Arrow, seldom

    return FileSystem.from_uri(path.url if scheme == "hf" else f"fsspec+{path}")


def _listed(path: ObjectPath, *, deep: bool = True) -> Iterator[tuple[ObjectPath, FileInfo]]:
    """What is beneath a folder; nothing if there is no such folder."""
    from pyarrow.fs import FileSelector  # noqa: PLC0415 - Arrow, seldom

    def find() -> tuple[str, list[FileInfo]]:
        system, place = system_of(path)
        inside = FileSelector(place, allow_not_found=True, recursive=deep)
        return place, system.get_file_info(inside)

    place, infos = asked(path, find)
    for info in infos:
        yield ObjectPath(path.url + info.path[len(place) :]), info


def opened(path: ObjectPath) -> tuple[Any, ObjectStat]:
    """An open object, and what it is now."""
    system, place = system_of(path)
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
