"""Job ids: how a new one is made, and which jobs a user may mean by a part of one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime

from batchrun.jobs.spec import JobSpec
from batchrun.objectstore.paths import location

_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
_MOST = 32  # characters of the name in an id
# Names that a writer of datasets gave: `part-0`, `train-00000-of-00004`, `0001`.
_NUMBERED = re.compile(
    r"(part|part-[rm]|data|shard|chunk|split|file|train|test|valid|validation|dev)?[-_]?\d+"
    r"([-_]of[-_]\d+)?([-_][0-9a-f]{4,}){0,5}([-_]c\d+)?"
)
# Folders that say nothing about a dataset either.
_PLAIN = {"", "/", ".", "data", "train", "test", "valid", "validation", "dev", "default", "parquet"}


def new_id(spec: JobSpec) -> str:
    """A new id, like `prompts-20261121-0837-x7k2`: the job's name, or its input's, then the time.

    A file that is one numbered part of a dataset says less than the folder it is in.
    """
    stem = _plain(spec.about.name or "") or _dataset(spec) or "job"
    suffix = "".join(secrets.choice(_LETTERS) for _ in range(4))
    return f"{stem}-{datetime.now(UTC).astimezone():%Y%m%d-%H%M}-{suffix}"


def _dataset(spec: JobSpec) -> str:
    path = location(spec.inputs[0].path)
    stem = path.name.split(".")[0]
    if _NUMBERED.fullmatch(stem.lower()):
        for folder in reversed(path.parts[:-1]):
            if "=" not in folder and folder.lower() not in _PLAIN and _plain(folder):
                return _plain(folder)
    return _plain(stem)


def _plain(name: str) -> str:
    """The letters and digits of a name, with dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_MOST].rstrip("-")


def matching(ids: Sequence[str], name: str) -> list[str]:
    """The ids that a name may mean: itself, else those that begin with it, else that hold it."""
    return (
        [i for i in ids if i == name]
        or [i for i in ids if i.startswith(name)]
        or [i for i in ids if name and name in i]
    )
