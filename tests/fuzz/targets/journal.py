"""A job's journal: its database, and its log."""

from __future__ import annotations

from pathlib import Path
from random import Random

from batchrun.jobs.errors import JobError
from tests.fuzz.mutate import damaged
from tests.fuzz.scenes import looked_at, scenes
from tests.fuzz.trial import Target

_FILES = {
    "done": ("done", "journal.db"),
    "stopped": ("stopped", "journal.db"),
    "killed": ("killed", "journal.db"),
    "log": ("killed", "journal.db-wal"),
}


def seeds(scratch: Path) -> dict[str, bytes]:
    return {name: scenes()[scene][file] for name, (scene, file) in _FILES.items()}


def check(name: str, data: bytes, scratch: Path) -> str:
    return looked_at(*_FILES[name], data, scratch)


def mutate(seed: bytes, rng: Random) -> bytes:
    """As others, or bits that mean something: most of a small database is room for more."""
    if rng.random() < 0.4:
        return damaged(seed, rng)
    data = bytearray(seed)
    used = [at for at, byte in enumerate(data) if byte]
    for at in rng.sample(used, rng.choice([1, 1, 2, 8])):
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


TARGETS = [Target("journal", seeds, check, (JobError,), mutate)]
