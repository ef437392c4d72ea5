"""The `batchrun` command as a soak uses it: every call is bounded, counted and looked at."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from batchrun.jobs.folder import JobFolder, list_jobs

BOUND_S = 300.0  # no command takes longer, however busy the machine is
_BUGS = ("Traceback", "bug in batchrun", "internal error")


class Problem(Exception):  # noqa: N818 - a finding, not a failure of the soak
    """Something that batchrun must not do."""


@dataclass
class Batchrun:
    """Commands in one home.

    Attributes:
        home: Where jobs lie.
        folder: Where commands run.
        temporary: Where they put temporary files.
        mark: In the environment of every process that comes of them.
        called: How often each command was called.
        slowest: Seconds of the longest call of each.
    """

    home: Path
    folder: Path
    temporary: Path
    mark: str
    called: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        name, _, value = self.mark.partition("=")
        return {
            **os.environ,
            name: value,
            "BATCHRUN_HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
        }

    def __call__(self, *arguments: object, codes: Iterable[int] | None = (0,)) -> str:
        """Run a command to its end; what it printed.

        Args:
            arguments: The command and its arguments.
            codes: What it may exit with; None for whatever a user can cause.

        Raises:
            Problem: It did not return, or not as it must.
        """
        began, command = time.monotonic(), str(arguments[0])
        done = self.start(*arguments)
        try:
            said, _ = done.communicate(timeout=BOUND_S)
        except subprocess.TimeoutExpired:
            done.kill()
            raise Problem(f"{_line(arguments)} did not return in {BOUND_S:.0f} s") from None
        seconds = time.monotonic() - began
        self.slowest[command] = max(seconds, self.slowest.get(command, 0))
        allowed = (0, 1, 3, 130) if codes is None else tuple(codes)
        if done.returncode not in allowed or any(bug in said for bug in _BUGS):
            raise Problem(f"{_line(arguments)} exited with {done.returncode}: {said[-2000:]}")
        return said

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start a command in a session of its own, as a terminal does."""
        self.called[str(arguments[0])] += 1
        return subprocess.Popen(
            [sys.executable, "-m", "batchrun", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def submit(self, *arguments: object) -> JobFolder:
        """Submit a job that nobody watches."""
        before = {job.id for job in list_jobs(self.home)}
        self("submit", *arguments, "--detach")
        [job] = [job for job in list_jobs(self.home) if job.id not in before]
        return job


def _line(arguments: Iterable[object]) -> str:
    return " ".join(["batchrun", *map(str, arguments)])
