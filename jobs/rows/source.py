"""Where rows come from: files, folders and globs, all of one format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from batchrun.jobs.errors import InputError
from batchrun.jobs.rows.formats import FORMATS, input_format, input_names, sniffed
from batchrun.jobs.rows.row import Source, reading
from batchrun.jobs.rows.rowformat import RowFormat
from batchrun.jobs.rows.store import INPUTS, Noted, Part, unnoted
from batchrun.objectstore.paths import Location, location

# Files that describe a dataset and are not part of it.
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def expand_inputs(
    paths: Sequence[str], log: Callable[[str], None] = lambda _: None
) -> tuple[list[Part], str]:
    """The files that the paths stand for, and the name of their common format.

    A folder stands for all files of a known format beneath it, except hidden ones and those whose
    names begin with `_`. Files come in natural order (`part-2` before `part-10`), each once.
    Folders named like `lang=de` on the way to a file become columns of its rows.

    Args:
        paths: What a user named.
        log: Told which files of a folder are left out.

    Raises:
        InputError: A path leads to nothing, or to files of unknown or of several formats.
    """
    found: dict[Location, tuple[Location, RowFormat]] = {}
    for path in paths:
        for file, kind in _expand(path, log):
            found.setdefault(file.resolve() if isinstance(file, Path) else file, (file, kind))
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
    return list(_parts(files)), ordered[0][1].name


def open_source(
    parts: Sequence[Part | Location],
    format: str,  # noqa: A002 - the field's word
    *,
    lenient: bool = False,
    noted: Noted = unnoted,
) -> Source:
    """Files as one sequence of rows: see `RowFormat.open`."""
    files = [p if isinstance(p, Part) else Part(p) for p in parts]
    return FORMATS[format].open(files, lenient=lenient, noted=noted)


def _expand(name: str, log: Callable[[str], None]) -> Iterator[tuple[Location, RowFormat]]:
    with reading(location(name)):
        found = list(INPUTS.expand(name))
    for path, beneath in found:
        if beneath is not None:
            yield from _of_folder(path, beneath, log)
            continue
        kind = input_format(path) or sniffed(path)
        if kind is None:
            raise InputError(
                f"{path}: its name does not say which format it has",
                hint=f"input names end in {input_names()}",
            )
        yield path, kind


def _of_folder(
    path: Location, beneath: Iterator[Location], log: Callable[[str], None]
) -> Iterator[tuple[Location, RowFormat]]:
    some, others = False, []
    for file in beneath:
        kind = input_format(file)
        if file.name in _ABOUT or kind is None:
            others.append(file.name)
            continue
        some = True
        yield file, kind
    if not some:
        arrow = any(name.endswith(".arrow") for name in others)
        raise InputError(
            f"folder {path} has no input files"
            + (", only Arrow files, as datasets' save_to_disk writes them" if arrow else ""),
            hint=f"datasets.load_from_disk('{path}').to_parquet('rows.parquet')"
            if arrow
            else f"input names end in {input_names()}",
        )
    if others:
        shown = ", ".join(sorted(others)[:3]) + (", ..." if len(others) > 3 else "")
        log(f"{path}: {len(others)} files are skipped because of their names: {shown}")


def _parts(files: Sequence[Location]) -> Iterator[Part]:
    """Each file with the columns from its folders' names, in Hive's style."""
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
        partition = {
            name: None if value == _NO_VALUE else int(value) if name in numbers else value
            for name, value in values.items()
        }
        yield Part(file, None, partition)


def _natural(path: Location) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)
