"""Mixed jobs, struck at random for hours: outputs as if undisturbed, nothing grows, nothing stays.

    python -m tests.soak --minutes 25 --seed 3

Each round submits one to three jobs that queue, disturbs them, resumes what stopped until all are
done, and compares each output, byte by byte, with that of the same work in a home where nothing
happens. Beside all rounds one long job runs, whose processes are measured. A disk of its own, to be
filled, is mounted where that is allowed. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import held_by
from batchrun.runner.live import read_progress
from tests.soak.batchrun import BOUND_S, Batchrun, Problem
from tests.soak.flat import Watched, left_behind, processes
from tests.soak.strikes import STRIKES, Strike, children, mount
from tests.soak.works import Work, alike, draw, write_many, write_models

_DONE = {"done", "done-with-errors"}
_STUCK_S = 1800.0  # without a result, a strike or another state: it never ends
_STRIKES = 8  # at most of one round
_LONG_ROWS = 200_000  # of the long job, for each minute: it is to be at work to the end
_SHARED = Path("/dev/shm")
_APART = "SOAK_APART"  # in the environment of a soak whose mounts are its own


@dataclass
class Tally:
    """What a soak came to."""

    jobs: int = 0
    rows: int = 0
    strikes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Soak:
    """Rounds of jobs in a home that is disturbed, and one in which nothing happens.

    Args:
        root: An empty folder.
        seed: Of all that is drawn.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.rng, self.tally, self._number = random.Random(seed), Tally(), 0
        self._root, self._mark = root, f"SOAK={os.getpid()}"
        self.rough, self.calm, self.long = (self._batchrun(n) for n in ("rough", "calm", "long"))
        self.apart = _APART in os.environ
        self.disk = self.apart and mount(self.rough.home, "32m")
        self._shared = [_SHARED] if self.apart and mount(_SHARED, "64m") else []
        self.models = write_models(root / "models")

    def _batchrun(self, name: str) -> Batchrun:
        folders = [self._root / name / part for part in ("home", "work", "temporary")]
        for folder in folders:
            folder.mkdir(parents=True)
        return Batchrun(*folders, mark=f"{self._mark}-{name}")

    def round(self) -> None:
        """Some jobs from their submission to their removal.

        Raises:
            Problem: Something is not as it must be.
        """
        works = []
        for _ in range(self.rng.randint(1, 3)):
            self._number += 1
            works.append(draw(self.rough.folder, self.models, self.rng, self._number))
        undisturbed = [self._submit(self.calm, work) for work in works]
        jobs = [self._submit(self.rough, work) for work in works]
        self._disturb(jobs)
        for job, same, work in zip(jobs, undisturbed, works, strict=True):
            self.calm("watch", same.id, codes=(0, 3))
            self._check(job, work)
        self.calm("rm", *(job.id for job in undisturbed))
        self.rough("rm", *(job.id for job in jobs))
        for batchrun in (self.calm, self.rough):
            self.check_nothing_left(batchrun)
            for path in batchrun.folder.iterdir():
                path.unlink()

    def clear(self) -> Path:
        """Begin anew after a problem; what there was is kept in a folder."""
        self._end("rough", "calm")
        kept = self._root / f"problem-{len(self.tally.problems)}"
        for batchrun in (self.rough, self.calm):
            (batchrun.home / "ballast").unlink(missing_ok=True)
            for folder in (batchrun.home, batchrun.folder, batchrun.temporary):
                shutil.copytree(folder, kept / folder.relative_to(self._root))
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return kept

    def _submit(self, batchrun: Batchrun, work: Work) -> JobFolder:
        return batchrun.submit(work.source, *work.arguments, "--again", "-o", work.output)

    def _disturb(self, jobs: list[JobFolder]) -> None:
        """Strike until there were enough strikes, and go on with what stopped until all is done."""
        left, viewers, since = self.rng.randint(1, _STRIKES), [], time.monotonic()
        before = None
        while undone := [job for job in jobs if job.state() not in _DONE]:
            if self.rng.random() < 0.2:
                viewers.append(self.rough.start("watch", self.rng.choice(undone).id))
            live = [job for job in undone if held_by(job.path) is not None]
            if left and live:
                left -= 1
                job = live[0] if self.rng.random() < 0.7 else live[-1]
                if self.rng.random() < 0.7:
                    self._wait_for_work(job)
                self._strike(self.rng.choice(STRIKES), job)
            elif not live:
                which = self.rng.choice(("--all", undone[0].id))
                self.rough("resume", which, "--detach", codes=(0, 1))
            time.sleep(self.rng.uniform(0, 2))
            now = [left, *((job.state(), job.counts().samples) for job in jobs)]
            if now != before:
                before, since = now, time.monotonic()
            if time.monotonic() - since > _STUCK_S:
                raise Problem(f"nothing has happened in {_STUCK_S:.0f} s: {now}")
        for viewer in viewers:
            if self.rng.random() < 0.5:
                viewer.kill()
            viewer.communicate(timeout=BOUND_S)

    def _wait_for_work(self, job: JobFolder) -> None:
        """Return when rows are being computed, or it takes too long, or the job has ended."""
        deadline = time.monotonic() + BOUND_S
        while held_by(job.path) is not None and time.monotonic() < deadline:
            seen = read_progress(job.path)
            if seen is not None and seen.phase == "run":
                time.sleep(self.rng.uniform(0, 2))
                return
            time.sleep(0.05)

    def _strike(self, strike: Strike, job: JobFolder) -> None:
        print(f"{strike.__name__} {job.id}, {job.state()}", file=sys.stderr)
        self.tally.strikes[strike.__name__] += strike(self.rough, job, self.rng)

    def _check(self, job: JobFolder, work: Work) -> None:
        """The job is done, sound, and its output that of the same work where nothing happens."""
        want, got = self.calm.folder / work.output, self.rough.folder / work.output
        if job.state() != ("done-with-errors" if work.failing else "done"):
            raise Problem(f"{job.id} is {job.state()}: {work.arguments}")
        self._compare(work, want, got)
        self.rough("verify", job.id)
        if self.rng.random() < 0.3:
            self.rough("export", job.id, "-o", f"again-{work.output}")
            self._compare(work, want, self.rough.folder / f"again-{work.output}")
        if work.failing and self.rng.random() < 0.5:
            self.rough("resume", job.id, "--retry-failed", codes=(3,))
            self._compare(work, want, got)
        for command in ("stats", "show", "logs"):
            self.rough(command, job.id)
        self.tally.jobs += 1
        self.tally.rows += job.counts().rows

    def _compare(self, work: Work, want: Path, got: Path) -> None:
        if not got.exists():
            raise Problem(f"{got.name} is not there: {work.arguments}")
        if not alike(want, got):
            raise Problem(f"{got.name} is not as {want}: {work.arguments}")

    def check_nothing_left(self, batchrun: Batchrun) -> None:
        deadline = time.monotonic() + BOUND_S
        while (alive := processes(batchrun.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)  # a viewer that ends
        left = left_behind(batchrun.home, batchrun.temporary, *self._shared)
        if alive or left:
            raise Problem(f"left behind: {alive or ''} {left or ''}")

    def end(self) -> None:
        """End every process of the soak."""
        self._end("rough", "calm", "long")

    def _end(self, *names: str) -> None:
        for name in names:
            for pid in processes(f"{self._mark}-{name}"):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)


def soak(root: Path, minutes: float, seed: int) -> tuple[Soak, Watched]:
    """Rounds for so long beside one long job, which is then cancelled, and goes."""
    soak = Soak(root, seed)
    source = soak.long.folder / "many.jsonl"
    write_many(source, int(_LONG_ROWS * minutes) + 1000)
    options = ("--model", soak.models[0], "--dtype", "float32", "--max-tokens", 3)
    job = soak.long.submit(source, *options, "--max-num-seqs", 32)
    viewer = soak.long.start("watch", job.id)

    def pids() -> dict[str, int]:
        supervisor = held_by(job.path)
        runs = children(supervisor) if supervisor is not None else []
        found = {"view": viewer.pid, "supervisor": supervisor, "run": runs[0] if runs else None}
        return {name: pid for name, pid in found.items() if pid is not None}

    watched = Watched(pids)
    watched.start()
    until = time.monotonic() + 60 * minutes
    try:
        while time.monotonic() < until:
            try:
                soak.round()
            except Exception as error:  # a finding, whatever it is
                said = str(error) if isinstance(error, Problem) else traceback.format_exc()
                soak.tally.problems.append(said)
                print(f"PROBLEM: {said}\n{soak.clear()} has what there was", file=sys.stderr)
        watched.end()
        if held_by(job.path) is None:  # how it ends is another matter than how it goes on
            soak.tally.problems.append("the long job ended before the soak: give it more rows")
        soak.tally.problems += watched.grown()
        soak.tally.rows += job.counts().rows
        soak.long("cancel", job.id, codes=(0, 1))
        viewer.communicate(timeout=BOUND_S)
        soak.long("verify", job.id)
        soak.long("rm", job.id)
        soak.check_nothing_left(soak.long)
    except Problem as problem:
        soak.tally.problems.append(str(problem))
    finally:
        soak.end()
    return soak, watched


def _apart() -> None:
    """Go on with mounts of this process's own, which end with it, where that is allowed."""
    own = ["unshare", "--mount"]
    with suppress(FileNotFoundError):
        if _APART not in os.environ and not subprocess.run([*own, "true"], check=False).returncode:
            command = [*own, sys.executable, "-m", "tests.soak", *sys.argv[1:]]
            os.execvpe(own[0], command, {**os.environ, _APART: "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hours", type=float, default=1)
    parser.add_argument("--minutes", type=float, help="instead of hours")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _apart()
    minutes = options.minutes if options.minutes is not None else 60 * options.hours
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    done, watched = soak(root, minutes, options.seed)
    tally = done.tally
    commands = sum((b.called for b in (done.rough, done.calm, done.long)), Counter[str]())
    report = {
        "benchmark": "soak",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seed": options.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "jobs": tally.jobs,
        "rows": tally.rows,
        "disturbances": dict(tally.strikes),
        "commands": dict(commands),
        "longest_s": {name: round(s, 1) for name, s in done.rough.slowest.items()},
        "long_job": watched.figures(),
        "own_disk": done.disk,
        "problems": tally.problems,
    }
    print(json.dumps(report), flush=True)
    if not tally.problems:
        if done.disk:
            subprocess.run(["umount", done.rough.home], check=True)
        shutil.rmtree(root)
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
