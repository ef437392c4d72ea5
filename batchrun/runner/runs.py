"""A job's runs as its supervisor sees them: how one ends, and whether there is another.

A run that dies of a fault is started again. The rows in it are counted, so that a row that kills
the process twice is not tried a third time. A run whose reader does not finish a prompt is killed,
and the row is not tried again.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from subprocess import Popen, TimeoutExpired
from types import FrameType

from batchrun.cgroups import oom_kills
from batchrun.children import FAULTS
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.inflight import InFlightRows, Making, ReaderNote, Reading
from batchrun.jobs.snapshot import WAITING, WORKER_LOG, JobSnapshot
from batchrun.runner.live import Reporter
from batchrun.runner.overdue import BARREN, Onlooker, Overrun, never_made, place_in

TELL: int = getattr(signal, "SIGUSR2", 0)  # asks a run to print where its threads are
_TELL_S = 1.0  # for printing that
_LOOK_S = 0.5  # between two looks at what a run is doing
_RESTARTS = 4  # in a row, without a result in between
_CRASHED = re.compile(r"^Current thread 0x([0-9a-f]+)", re.MULTILINE)
_WORDS = 300  # characters
_FAILED, _INTERRUPTED = 1, 130  # exit codes of the supervisor


class Runs:
    """The runs of a job, one after the other. Passes SIGTERM and SIGINT on to the current one.

    Args:
        job: The job.
        reporter: Told how runs end.

    Attributes:
        told: The signal that told this process to end; it starts nothing after that.
    """

    def __init__(self, job: JobFolder, reporter: Reporter) -> None:
        self._job, self._reporter = job, reporter
        self.told: int | None = None
        self._child: Popen[bytes] | None = None
        signal.signal(signal.SIGINT, self._pass_on)
        signal.signal(signal.SIGTERM, self._pass_on)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._log = job.path / WORKER_LOG
        self._vain = self._barren = 0  # successive runs without a result, without a good one
        self._unread: Reading | None = None  # what the previous run was reading when it crashed

    def run(self, start: Callable[[], Popen[bytes]]) -> int:
        """Run the job, again if a run dies of a fault, until a run ends by itself.

        Args:
            start: Starts a run.

        Returns:
            The supervisor's exit code.
        """
        while self.told is None:
            if (code := self._once(start)) is not None:
                return code
        self._job.set_state("cancelled")
        return _INTERRUPTED

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.told = number
        if self._child is not None:
            self._child.send_signal(number)

    def _once(self, start: Callable[[], Popen[bytes]]) -> int | None:
        """Start a run and wait for its end; None if the job is to be run again."""
        self._before, self._oom_kills = self._job.counts(), oom_kills()
        self._printed = self._log.stat().st_size if self._log.exists() else 0  # bytes, so far
        with closing(ReaderNote(self._job.path)) as note:
            note.made()  # clears the note of the earlier run
            child = self._child = start()
            if self.told is not None:  # while it was started
                child.send_signal(self.told)
            code, overrun = self._watch(child, note)
        if overrun is not None:
            return self._overran(overrun)
        if code >= 0:
            self._note_silent_end(code)
            return code
        if self.told is not None:
            return self._stopped()
        name = signal.Signals(-code).name
        if -code not in FAULTS:
            return self._killed(name)
        rows, read = self._suspects()
        return self._crashed(name, rows) if read is None else self._crashed_reading(name, read)

    def _watch(self, child: Popen[bytes], note: ReaderNote) -> tuple[int, Overrun | None]:
        """Wait for the end; return the exit code, and the prompt that it was killed for, if any."""
        onlooker, overrun = Onlooker(child.pid, note), None
        while overrun is None:
            with suppress(TimeoutExpired):
                return child.wait(_LOOK_S), None
            overrun = onlooker.look()
        child.send_signal(TELL)  # faulthandler prints where it is, and needs no lock
        with suppress(TimeoutExpired):
            child.wait(_TELL_S)
        child.kill()
        return child.wait(), overrun

    def _stopped(self) -> int:
        self._job.set_state("cancelled" if self._job.cancel_requested() else "interrupted")
        return _INTERRUPTED

    def _failed(self, reason: str, hint: str | None) -> int:
        self._job.set_state("failed", reason, hint)
        return _FAILED

    def _overran(self, overrun: Overrun) -> int | None:
        """Handle a prompt that took too long."""
        row, place = overrun.at.row, place_in(self._stack(overrun.at.thread))
        self._reporter.message(f"row {row}: {overrun.reason}{place}; the run was stopped")
        if self.told is not None:
            return self._stopped()
        _blame(self._job, overrun, place)
        self._count()
        if self._barren < BARREN:
            return None
        error = never_made(self._barren, place)
        return self._failed(str(error), error.hint)

    def _killed(self, name: str) -> int:
        """Handle a run that somebody killed, or the system."""
        reason, hint = f"the run was killed by {name}", None
        if name == "SIGKILL" and oom_kills() > self._oom_kills:
            reason += ": the machine ran out of memory"
            hint = "batchrun resume with a lower --max-num-seqs N or --kv-budget SIZE"
        elif name == "SIGKILL":
            reason += ": by a user, or by the system because memory ran out"
        self._job.set_state("interrupted", reason, hint)
        self._reporter.message(reason)
        return _FAILED

    def _crashed_reading(self, name: str, read: Reading) -> int | None:
        """Handle a crash caused by the file that was being read."""
        reason = f"the run crashed with {name} while it read {read}"
        self._reporter.message(reason)
        if read != self._unread:
            self._unread = read
            return None
        hint = "write it again; until then, batchrun export --partial writes the finished rows"
        return self._failed(f"{reason}: the file is damaged", hint)

    def _crashed(self, name: str, rows: list[int]) -> int | None:
        """Handle a crash that some of the run's rows may have caused."""
        with self._job.journal(readonly=False) as journal:
            journal.count_crash(rows)
        self._count()
        self._reporter.message(f"the run crashed with {name}; {len(rows)} rows were running")
        if self._vain < _RESTARTS and self._barren < BARREN:
            return None
        times = max(self._vain, self._barren)
        return self._failed(
            f"the run crashed with {name} {times} times in a row, and no row was answered",
            "for details: batchrun logs",
        )

    def _count(self) -> None:
        """Note whether the run achieved anything."""
        before, after = self._before, self._job.counts()
        self._vain = self._vain + 1 if after.samples == before.samples else 0
        good = after.completion_tokens != before.completion_tokens
        self._barren = 0 if good else self._barren + 1

    def _suspects(self) -> tuple[list[int], Reading | None]:
        """Rows that may have crashed the run, or what it was reading when it died."""
        path = self._job.path
        with closing(InFlightRows(path)) as running, closing(ReaderNote(path)) as note:
            rows, at = running.rows(), note.at()
        if at is None:
            return rows, None
        printed = _CRASHED.findall(self._words())
        thread = int(printed[-1], 16) if printed else None  # where it died, by faulthandler
        mine = thread == at.thread
        if isinstance(at, Making):
            return [at.row] if mine else [*rows, at.row] if thread is None else rows, None
        # A pure C++ thread has no id here. If rows were in the engine, it may be the engine's.
        if mine or (thread is None and not rows):
            return [], replace(at, thread=0)
        return rows, None

    def _stack(self, thread: int) -> str:
        """The stack that faulthandler last printed for a thread."""
        found = re.findall(rf"hread 0x0*{thread:x} .*?\n((?:  .*\n)*)", self._words())
        return str(found[-1]) if found else ""

    def _note_silent_end(self, code: int) -> None:
        """Note how a run ended if it could not: a library, or Python, ended its process."""
        noted = JobSnapshot.load(self._job.path)
        if noted is not None and noted.state not in WAITING:
            return
        lines = [line for line in map(str.strip, self._words().splitlines()) if line]
        if any(line.startswith("error: ") for line in lines):
            return  # it did say why, and someone else may have the job
        words = f"its last line: {lines[-1][:_WORDS]}" if lines else "it printed nothing"
        self._job.set_state(
            "interrupted",
            f"the run ended with exit code {code} before it could say why; {words}",
            "for details: batchrun logs; for what this machine lacks: batchrun doctor; then: "
            "batchrun resume",
        )

    def _words(self) -> str:
        """What the job's processes printed since the run began."""
        if not self._log.exists():
            return ""
        return self._log.read_bytes()[self._printed :].decode(errors="replace")


def _blame(job: JobFolder, overrun: Overrun, place: str) -> None:
    """Note the row to blame; if that is uncertain, it is tried once more, alone."""
    row = overrun.at.row
    with job.journal(readonly=False) as journal:
        if overrun.certain or row in journal.crash_counts():
            journal.condemn(row, overrun.reason + place)
        else:
            journal.count_crash([row])
