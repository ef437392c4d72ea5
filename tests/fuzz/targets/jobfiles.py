"""What lies beside a journal in a job's folder."""

from __future__ import annotations

from pathlib import Path
from random import Random

from batchrun.jobs.errors import JobError
from tests.fuzz.mutate import damaged, json_damaged
from tests.fuzz.scenes import looked_at, scenes
from tests.fuzz.trial import Target

_FILES = {
    "job": ("done", "job.json"),
    "unfinished": ("stopped", "job.json"),
    "state": ("done", "state.json"),
    "interrupted": ("stopped", "state.json"),
    "stats": ("done", "stats.json"),
    "places": ("stopped", "places.json"),
    "limits": ("stopped", "limits.json"),
    "progress": ("stopped", "progress.json"),
    "log": ("stopped", "log.jsonl"),
    "rows": ("stopped", "running-rows"),
    "lock": ("stopped", "lock"),
}


def seeds(scratch: Path) -> dict[str, bytes]:
    return {name: scenes()[scene][file] for name, (scene, file) in _FILES.items()}


def check(name: str, data: bytes, scratch: Path) -> str:
    return looked_at(*_FILES[name], data, scratch)


def mutate(seed: bytes, rng: Random) -> bytes:
    """As JSON where it is some."""
    return (json_damaged if seed.startswith(b"{") else damaged)(seed, rng)


TARGETS = [Target("jobfiles", seeds, check, (JobError,), mutate)]
