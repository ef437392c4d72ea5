"""A job that comes no further than a test wants, however the processes are scheduled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HOLD = """
import os, sys, time
if 'run-job' in sys.orig_argv:
    from batchrun.runner import job_run
    opening, steps = job_run.open_runtime, iter(range({steps}))
    def opened(*arguments):
        workbench = opening(*arguments)
        step = workbench.engine.step
        def held():
            if next(steps, None) is None and not os.path.exists({open!r}):
                time.sleep(0.01)
                return []
            return step()
        workbench.engine.step = held
        return workbench
    job_run.open_runtime = opened
"""


@dataclass(frozen=True)
class Gate:
    """Runs that begin while it is closed compute some steps, and no more until it is open.

    They can be cancelled, killed and stopped meanwhile, and will not have ended before.
    """

    place: Path

    def close(self, steps: int) -> None:
        """Let runs that begin from now on compute so many steps."""
        (self.place / "sitecustomize.py").write_text(
            _HOLD.format(steps=steps, open=str(self.place / "open"))
        )

    def open(self) -> None:
        """Let all go on to their end."""
        (self.place / "open").touch()
