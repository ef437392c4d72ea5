"""Where rows come from: files, folders and globs, of one format."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from urllib.parse import unquote

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.formats import FORMATS, input_format, input_names, sniffed
from batchrun.jobs.rows.row import Noted, Part, Source, reading, unnoted
from batchrun.jobs.rows.rowformat import RowFormat

# What describes a dataset and is no part of it.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def expand_inputs(
    paths: Sequence[str], log: Callable[[str], None] = lambda _: None
) -> tuple[list[Part], str]:
    """The files that files, folders and globs name, and the name of the one format they have.

    A folder stands for all files of a known format beneath it, hidden ones and those whose names
    begin with `_` left out. Files come in natural order (`part-2` before `part-10`), each once.
    Folders named like `lang=de` on the way to a file are columns of its rows.

    Args:
        paths: What a user named.
        log: Told which files of a folder are left out.

    Raises:
        InputError: A path leads to nothing, or to files of unknown or of several formats.
    """
    found: dict[Path, tuple[Path, RowFormat]] = {}
    for path in paths:
        for file, kind in _expand(path, log):
            found.setdefault(file.resolve(), (file, kind))
    if not found:
        raise InputError("no input files were given", hint="batchrun submit prompts.parquet")
    ordered = sorted(found.values(), key=lambda known: _natural(known[0]))
    formats = {kind: file for file, kind in reversed(ordered)}
    if len(formats) > 1:
        each = [f"{file} is {kind.title}" for kind, file in formats.items()]
        raise InputError(
            f"the input mixes formats: {', '.join(sorted(each))}",
            hint="submit them as separate jobs",
        )
    files = [file for file, _ in ordered]
    parts = [Part(file, None, values) for file, values in _partitions(files)]
    return parts, ordered[0][1].name


def open_source(
    parts: Sequence[Part | Path],
    format: str,  # noqa: A002 - the field's word
    *,
    lenient: bool = False,
    noted: Noted = unnoted,
) -> Source:
    """Files as one sequence of rows: see `RowFormat.open`."""
    files = [p if isinstance(p, Part) else Part(p) for p in parts]
    return FORMATS[format].open(files, lenient=lenient, noted=noted)


def _expand(path: str, log: Callable[[str], None]) -> Iterator[tuple[Path, RowFormat]]:
    where = Path(path).expanduser()
    with reading(where):
        try:
            where.lstat()
            there = True
        except (FileNotFoundError, NotADirectoryError):
            there = False
    if there:
        yield from _files(where, log)
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
        yield from _files(Path(match), log)


def _files(path: Path, log: Callable[[str], None]) -> Iterator[tuple[Path, RowFormat]]:
    """The file itself, or the input files beneath a folder, and their formats."""
    if os.path.isdir(path):
        yield from _beneath(path, log)
        return
    if not os.path.exists(path):
        raise InputError(f"{path} is a link to a file that is not there", f"ls -l '{path}'")
    if not os.path.isfile(path):
        raise InputError(
            f"{path} is not a regular file", hint=f"pipe it in: batchrun submit - < '{path}'"
        )
    kind = input_format(path) or sniffed(path)
    if kind is None:
        raise InputError(
            f"{path} has no known input format (by its name)", hint=f"names end in {input_names()}"
        )
    yield path, kind


def _beneath(path: Path, log: Callable[[str], None]) -> Iterator[tuple[Path, RowFormat]]:
    def refuse(error: OSError) -> None:
        raise InputError(
            f"{error.filename} can't be read: {error.strerror}", f"ls -ld '{error.filename}'"
        ) from error

    some, others, arrow = False, [], False
    been: set[tuple[int, int]] = set()  # a link may lead back up
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        names.sort()
        folders[:] = sorted(
            (name for name in folders if not name.startswith((".", "_"))),
            key=lambda name: (os.path.islink(os.path.join(folder, name)), name),
        )
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in been:
            folders.clear()
            continue
        been.add((here.st_dev, here.st_ino))
        for name in names:
            if name.startswith((".", "_")):
                continue
            kind = input_format(Path(name))
            if name in _ABOUT or kind is None:
                others.append(name)
                arrow |= name.endswith(".arrow")
                continue
            some = True
            yield Path(folder, name), kind
    if not some:
        raise InputError(
            f"folder {path} has no input files"
            + (", but Arrow files, as datasets' save_to_disk writes them" if arrow else ""),
            hint=f"datasets.load_from_disk('{path}').to_parquet('rows.parquet')"
            if arrow
            else f"input files' names end in {input_names()}",
        )
    if others:
        shown = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
        log(f"{path}: {len(others)} files are left out, by their names: {shown}")


def _partitions(files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, int | str | None]]]:
    """Each file with what the folders on the way to it say, as hive names them."""
    said: list[dict[str, str]] = []
    for file in files:
        pairs = [part.partition("=") for part in file.parts[:-1]]
        said.append(
            {unquote(name): unquote(value) for name, equals, value in pairs if name and equals}
        )
    # `01` would come out as 1.
    numbers = {
        name
        for name in {name for values in said for name in values}
        if all(re.fullmatch(r"0|-?[1-9]\d{0,17}|" + _NO_VALUE, v.get(name, "0")) for v in said)
    }
    for file, values in zip(files, said, strict=True):
        yield (
            file,
            {
                name: None if value == _NO_VALUE else int(value) if name in numbers else value
                for name, value in values.items()
            },
        )


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def _existing_parent(path: Path) -> Path:
    return next((parent for parent in path.parents if os.path.isdir(parent)), Path("/"))
