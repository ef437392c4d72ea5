"""Where rows come from: files, folders and globs of Parquet or JSON Lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from jobs.errors import InputError
from jobs.jsonl import JsonlSource
from jobs.parquet import ParquetSource
from jobs.row import Row, Source, missing_column, reading

__all__ = ["Format", "Row", "Source", "expand_inputs", "missing_column", "open_source"]

Format = Literal["parquet", "jsonl"]

_PARQUET = {".parquet", ".pq"}
_JSONL = {".jsonl", ".ndjson", ".json"}
_COMPRESSED = {".gz", ".zst"}
_FORMATS = ".parquet, .pq, .jsonl, .ndjson or .json, the last three also with .gz or .zst"


def expand_inputs(paths: Sequence[str]) -> tuple[list[Path], Format]:
    """The files that files, folders and globs name, and the one format they have.

    A folder stands for all files of a known format beneath it, hidden ones and those whose names
    begin with `_` left out. Files come in natural order (`part-2` before `part-10`), each once.

    Raises:
        InputError: A path leads to nothing, or to files of unknown or of both formats.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _expand(path):
            found.setdefault(file.resolve(), file)
    if not found:
        raise InputError("no input files were given", hint="batchrun submit prompts.parquet")
    files = sorted(found.values(), key=_natural)
    formats = {_known_format(file): file for file in reversed(files)}
    if len(formats) > 1:
        raise InputError(
            f"the input mixes formats: {formats['parquet']} is Parquet, "
            f"{formats['jsonl']} is JSON Lines",
            hint="submit them as separate jobs",
        )
    return files, next(iter(formats))


def open_source(paths: Sequence[Path], format: str) -> Source:  # noqa: A002 - the field's word
    """Open files of one format as one sequence of rows.

    Reads metadata and beginnings only.

    Raises:
        InputError: A file is damaged or unreadable, Parquet schemas differ, or there are no rows.
    """
    if format == "parquet":
        return ParquetSource(paths)
    return JsonlSource(paths)


def _expand(path: str) -> Iterator[Path]:
    where = Path(path).expanduser()
    with reading(where):
        try:
            where.lstat()
            there = True
        except (FileNotFoundError, NotADirectoryError):
            there = False
    if there:
        yield from _files(where)
        return
    if not has_magic(path):
        raise InputError(
            f"{path}: there is no such file or folder",
            hint=f"ls '{_existing_parent(where)}' shows what there is",
        )
    matches = glob(str(where), recursive=True)
    if not matches:
        raise InputError(f"no file matches {path}", hint="check the pattern, quotes around it")
    for match in matches:
        yield from _files(Path(match))


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or the input files beneath a folder."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise InputError(f"{path} is a link to a file that is not there", f"ls -l '{path}'")
        if not os.path.isfile(path):
            raise InputError(f"{path} is not a regular file", hint="write its content to a file")
        if _format(path) is None:
            raise InputError(
                f"{path} has no known input format (by its name)",
                hint=f"names end in {_FORMATS}",
            )
        yield path
        return

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename} can't be read: {error.strerror}", f"ls -ld '{error.filename}'"
        ) from error

    some = False
    for folder, folders, names in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            if not name.startswith((".", "_")) and _format(Path(name)) is not None:
                some = True
                yield Path(folder, name)
    if not some:
        raise InputError(
            f"folder {path} has no input files", hint=f"input files' names end in {_FORMATS}"
        )


def _format(path: Path) -> Format | None:
    suffix = path.suffix.lower()
    if suffix in _PARQUET:
        return "parquet"
    if suffix in _COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    return "jsonl" if suffix in _JSONL else None


def _known_format(path: Path) -> Format:
    known = _format(path)
    assert known is not None  # `_files` yields no other
    return known


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def _existing_parent(path: Path) -> Path:
    return next((parent for parent in path.parents if os.path.isdir(parent)), Path("/"))
