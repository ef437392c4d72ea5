"""What must not grow: the memory, maps, handles and threads of a process, and what jobs leave."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 1.0
_GROWTH = 1.05  # of memory, between two moments of a long job
_SLACK = {"rss": 8 << 20, "maps": 8, "handles": 2, "threads": 0}


@dataclass(frozen=True)
class Sample:
    """A process at one moment; `rss` in bytes."""

    rss: int
    maps: int
    handles: int
    threads: int


def sample(pid: int) -> Sample | None:
    """How a process stands, or None where there is none."""
    folder = Path(f"/proc/{pid}")
    with suppress(OSError):
        return Sample(
            int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            (folder / "maps").read_text().count("\n"),
            len(os.listdir(folder / "fd")),
            len(os.listdir(folder / "task")),
        )
    return None


class Watched(threading.Thread):
    """Samples processes until told to end.

    Args:
        pids: Says which, by name.
    """

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        super().__init__(daemon=True)
        self._pids, self._ended = pids, threading.Event()
        self.samples: dict[str, list[Sample]] = {}

    def run(self) -> None:
        while not self._ended.wait(_EVERY_S):
            for name, pid in self._pids().items():
                if (found := sample(pid)) is not None:
                    self.samples.setdefault(name, []).append(found)

    def end(self) -> None:
        self._ended.set()
        self.join()

    def figures(self) -> dict[str, dict[str, tuple[int, int]]]:
        """By process and measure: the most in the second fifth of its time, and in the last."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, samples in self.samples.items():
            fifth = len(samples) // 5
            if fifth:
                early, late = samples[fifth : 2 * fifth], samples[-fifth:]
                found[name] = {
                    measure: (max(_of(early, measure)), max(_of(late, measure)))
                    for measure in _SLACK
                }
        return found

    def grown(self) -> Iterator[str]:
        """What is not flat."""
        for name, measures in self.figures().items():
            for measure, (early, late) in measures.items():
                allowed = early * (_GROWTH if measure == "rss" else 1) + _SLACK[measure]
                if late > allowed:
                    yield f"{measure} of the {name} of a long job grew from {early} to {late}"


def _of(samples: list[Sample], measure: str) -> list[int]:
    return [getattr(one, measure) for one in samples]


def processes(mark: str) -> dict[int, str]:
    """The living processes that have `mark` in their environment, and what they are."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not dead and mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
    return found


def left_behind(home: Path, *others: Path) -> list[str]:
    """What removed jobs have left in a home, and processes in folders that must be empty."""
    kept = {"measured", "verdicts"}  # figures of each model and its settings
    left = [path for folder in others for path in folder.rglob("*")]
    for path in home.rglob("*"):
        top = path.relative_to(home).parts[0]
        if not path.is_dir() and top not in kept and path.name != ".submitting":
            left.append(path)
    return [str(path) for path in left]
