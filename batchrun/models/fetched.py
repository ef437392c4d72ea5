"""Models that are objects in a store, downloaded to this machine once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from hashlib import blake2b
from pathlib import Path

from batchrun import platforms
from batchrun.errors import ModelError
from batchrun.jobs.files import fsync_directory, make_folders, private_mode
from batchrun.jobs.rows.store import each
from batchrun.models.folder import INDEX, SINGLE, no_safetensors
from batchrun.models.gguf import check_ours
from batchrun.objectstore.client import ObjectStat, beneath, stat_object
from batchrun.objectstore.files import download
from batchrun.objectstore.paths import ObjectPath

TWICE = ("consolidated*", "original/*")  # the same weights again, in their maker's own format
_AT_ONCE = 8  # files: one connection is slower than a network


def fetched(
    path: ObjectPath, cache_dir: Path, patterns: Sequence[str], log: Callable[[str], None]
) -> Path:
    """A model's folder, or its GGUF file, as a copy on this machine.

    A copy is whole or not there. What a download that failed has brought is kept for the next one.

    Args:
        path: The folder or the GGUF file.
        cache_dir: Where copies are kept.
        patterns: The names of files that belong to a model.
        log: Called before a download.

    Raises:
        ModelError: There is no such model, or no room for it.
        StoreError: The store does not answer.
    """
    files = _files(path, patterns)
    digest = blake2b(digest_size=8)
    for name, found in sorted(files.items()):
        digest.update(os.fsencode(f"{name}\0{found.size}\0{found.tag}\0"))
    final = cache_dir / f"{path.name}-{digest.hexdigest()}"
    if not final.is_dir():
        with _arriving(final) as folder:
            if folder is not None:
                _download(path, files, folder, log)
    check_ours(final)
    return final / path.name if list(files) == [path.name] else final


def _files(path: ObjectPath, patterns: Sequence[str]) -> Mapping[str, ObjectStat]:
    """A model's files, by name."""
    try:
        found = beneath(path)
    except FileNotFoundError:
        raise ModelError(
            f"no model {path}: there is no such object or folder", hint="check its name"
        ) from None
    if found is None:
        if path.suffix != ".gguf":
            raise ModelError(
                f"{path} is a single file; a model is a folder of safetensors or one .gguf",
                hint="give the folder that holds its config.json",
            )
        return {path.name: stat_object(path)}
    names = [str(file)[len(str(path)) + 1 :] for file in found]
    if not any(name.endswith(".safetensors") for name in names):
        raise no_safetensors(str(path), names)
    twice = TWICE if {SINGLE, INDEX} & set(names) else ()
    wanted = [
        name
        for name in names
        if is_model_file(name, patterns) and not any(fnmatch(name, pattern) for pattern in twice)
    ]
    paths = [path / name for name in wanted]
    return dict(zip(wanted, each(paths, lambda i: stat_object(paths[i])), strict=True))


def is_model_file(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches a pattern, folder by folder, and leads to no other folder."""
    same = (p for p in patterns if name.count("/") == p.count("/"))
    return ".." not in name.split("/") and any(fnmatch(name, pattern) for pattern in same)


@contextmanager
def _arriving(final: Path) -> Iterator[Path | None]:
    """A folder that becomes `final` when the block ends; None if another process has made that."""
    if platforms.WINDOWS:  # it locks no folder
        platforms.need_linux("fetching a model")
    make_folders(final.parent)
    partial = final.with_name(f"{final.name}.partial")
    partial.mkdir(private_mode(final.parent), exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        platforms.flock(handle)
        if final.is_dir():
            with suppress(OSError):
                partial.rmdir()
            yield None
            return
        yield partial
        partial.rename(final)
        fsync_directory(final.parent)
    finally:
        os.close(handle)


def _download(
    path: ObjectPath, files: Mapping[str, ObjectStat], folder: Path, log: Callable[[str], None]
) -> None:
    alone = list(files) == [path.name]
    missing = {
        name: stat.size
        for name, stat in files.items()
        if not ((there := folder / name).is_file() and there.stat().st_size == stat.size)
    }
    needed, free = sum(missing.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"{path} takes {needed / 1e9:,.1f} GB, but the disk of {folder.parent} has "
            f"{free / 1e9:,.1f} GB left",
            hint=f"make room there: df -h '{folder.parent}'",
        )
    log(f"downloading {path} (once): {needed / 1e6:,.0f} MB in {len(missing)} files")

    def fetch(name: str) -> None:
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f"{to.name}.part")
        part.unlink(missing_ok=True)  # of a process that was killed
        download(path if alone else path / name, part)
        part.rename(to)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(fetch, missing):
            pass
