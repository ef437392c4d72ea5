"""Tries mutants in a child process, and tells how each ended: also by a signal, or not at all."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import select
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.fuzz.mutate import Mutate, damaged

CPU_S = 20.0  # that one file may take of the processor
WALL_S = 150.0  # and of a busy machine's time
MEMORY = 512 << 20  # bytes that it may take beside what the process has
_POLL_S = 0.02


class Wrong(Exception):  # noqa: N818 - a verdict
    """What came of a damaged file is neither the right data nor an error."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Args:
        name: The folder of its corpus.
        seeds: Sound files by name, made in a scratch folder that is theirs.
        check: Given the name of a seed, a mutant of it and an empty folder: does with the mutant
            what batchrun does, and returns in a word what it found. Raises `Wrong` if that is not
            right, one of `refusals` if the file is refused.
        refusals: Typed errors, whose text a user is shown.
        mutate: Damages a seed.
        memory: Bytes that one file may take.
        isolated: Of files of which batchrun knows that reading them may end the process: the check
            as it is done where batchrun is safe from that.
        quick: Mutants that `make test` tries.
    """

    name: str
    seeds: Callable[[Path], dict[str, bytes]]
    check: Callable[[str, bytes, Path], str]
    refusals: tuple[type[BaseException], ...]
    mutate: Mutate = damaged
    memory: int = MEMORY
    isolated: Callable[[str, bytes, Path], str] | None = None
    quick: int = 60


@dataclass
class Report:
    """How the mutants of a target ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    escaped: list[tuple[str, str, bytes]] = field(default_factory=list)  # seed, how, the file


def mutants(target: Target, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """So many files, each with the name of the seed that it was; the same ones each time."""
    with tempfile.TemporaryDirectory() as scratch:
        seeds = sorted(target.seeds(Path(scratch)).items())
    for number in range(count):
        rng = Random(f"{target.name} {seed} {number}")
        name, sound = seeds[number % len(seeds)]
        yield name, target.mutate(sound, rng)


def attempt(
    target: Target,
    files: Iterable[tuple[str, bytes]],
    *,
    cpu_s: float = CPU_S,
    wall_s: float = WALL_S,
) -> Report:
    """Try files; what is no right data and no refusal has escaped."""
    report, child = Report(), None
    try:
        for name, data in files:
            child = child or _Child(target)
            outcome = child.outcome(name, data, cpu_s, wall_s)
            if outcome is None:
                outcome, child = child.ended(), None
                if target.isolated is not None and outcome.startswith("ends in SIG"):
                    outcome = _isolated(target, name, data, cpu_s, wall_s)
            good = outcome.startswith(("right", "refused"))
            report.outcomes[outcome.partition(":")[0] if good else "escaped"] += 1
            if not good:
                report.escaped.append((name, outcome, data))
    finally:
        if child is not None:
            child.close()
    return report


def _isolated(target: Target, name: str, data: bytes, cpu_s: float, wall_s: float) -> str:
    """How a file ends that brought a process down, where that may not be."""
    assert target.isolated is not None
    child = _Child(replace(target, check=target.isolated))
    outcome = child.outcome(name, data, cpu_s, wall_s)
    if outcome is None:
        return child.ended()
    child.close()
    return outcome


class _Child:
    """A forked process that tries one file after the other."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._why = ""
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        todo, done = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(todo[1])
            os.close(done[0])
            try:
                _serve(target, todo[0], done[1], Path(self._folder.name))
            finally:
                os._exit(97)  # only at the end of its input
        os.close(todo[0])
        os.close(done[1])
        self._todo, self._done = todo[1], done[0]
        self._memory = self._resident() + target.memory

    def outcome(self, name: str, data: bytes, cpu_s: float, wall_s: float) -> str | None:
        """How the file ended; None if the process did."""
        mutant = Path(self._folder.name, "mutant")
        mutant.write_bytes(data)
        os.write(self._todo, f"{name}\n".encode())
        began, cpu = time.monotonic(), self._cpu()
        while not select.select([self._done], [], [], _POLL_S)[0]:
            if self._cpu() - cpu > cpu_s or time.monotonic() - began > wall_s:
                self._why = f"hangs: {cpu_s:.0f} s of the processor, or {wall_s:.0f} s"
            elif self._resident() > self._memory:
                self._why = f"takes more than {self._target.memory >> 20} MiB of memory"
            if self._why:
                os.kill(self._pid, signal.SIGKILL)
                return None
        said = os.read(self._done, 1 << 16).decode()
        return json.loads(said) if said else None

    def ended(self) -> str:
        """How the process ended, which has."""
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._clean()
        return self._why or (
            f"ends in {signal.Signals(-status).name}" if status < 0 else f"ends in exit {status}"
        )

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._clean()

    def _clean(self) -> None:
        os.close(self._todo)
        os.close(self._done)
        self._folder.cleanup()

    def _resident(self) -> int:
        with suppress(OSError, IndexError):
            pages = Path(f"/proc/{self._pid}/statm").read_text().split()[1]
            return int(pages) * resource.getpagesize()
        return 0

    def _cpu(self) -> float:
        with suppress(OSError, IndexError):
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0


def _serve(target: Target, todo: int, done: int, folder: Path) -> None:
    """The child: what is to do comes a line each, and so does what came of it."""
    faulthandler.disable()  # pytest has it on
    quiet = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(quiet, handle)
    gc.freeze()
    with os.fdopen(todo) as lines:
        for line in lines:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                data = (folder / "mutant").read_bytes()
                outcome = _outcome(target, line.rstrip("\n"), data, Path(scratch))
            os.write(done, json.dumps(outcome[:8000]).encode())
            gc.collect()  # jobs leave cycles behind with tables of 4 MiB in them


def _outcome(target: Target, name: str, data: bytes, scratch: Path) -> str:
    try:
        return f"right: {target.check(name, data, scratch)}"
    except target.refusals as error:
        text = str(error)
        if not text.strip():
            return f"is refused with no word: {type(error).__name__}"
        return f"refused: {type(error).__name__}: {text}"
    except Wrong as error:
        return f"is wrong: {error}"
    except BaseException as error:
        where = traceback.format_exception(error)
        return f"raises {type(error).__name__}: {error}\n{''.join(where)[-4000:]}"
