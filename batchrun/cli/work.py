"""The commands that worker processes run; nobody types them."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import click

from batchrun import children
from batchrun.cli.errors import STATUS, ExitStatus, explain, print_error
from batchrun.errors import StepFailed
from batchrun.jobs.errors import Fenced, LeaseHeld
from batchrun.jobs.folder import JobFolder, home
from batchrun.machine import end_with_lost_threads, use_cores
from batchrun.runner import supervisor
from batchrun.runner.ahead import job_handed
from batchrun.runner.live import Reporter
from batchrun.runner.overdue import prompt_seconds, stall_seconds
from batchrun.runner.runs import TELL
from batchrun.runner.story import Story
from batchrun.runner.watchdog import Watchdog
from batchrun.terminal import tell


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM in the block sets; the second ends the process."""
    event = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set():
            # Every acknowledged result is on disk already, so nothing is lost by dying here.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        event.set()

    before = [(n, signal.signal(n, handle)) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield event
    finally:
        for number, handler in before:
            signal.signal(number, handler)


_folder = click.argument("folder", type=click.Path(path_type=Path), required=False)
_parent = click.option("--parent", type=int, default=0)  # that hands it a job


@click.command(hidden=True)
@_folder
@_parent
def work_command(folder: Path | None, parent: int) -> int:
    """Be the supervisor of a job; without a folder, of one that is handed to it."""
    if folder is not None:
        return supervisor.work(folder, children.inherited(), home())
    children.end_with_parent(parent)
    return supervisor.work_ahead(home())


@click.command(hidden=True)
@_folder
@_parent
def run_job_command(folder: Path | None, parent: int) -> int:
    """Run a job, as its supervisor's child; without a folder, one that is handed to it."""
    if folder is not None:
        return _run_job(folder, children.inherited())
    children.end_with_parent(parent)
    try:
        if use_cores() is not None:
            return ExitStatus.FAILED
        from batchrun.runner import job_run, opening  # noqa: F401, PLC0415 - as below

        opening.import_engine()
    except Exception:
        return ExitStatus.FAILED  # whoever gets the job instead says why, in its log
    handed = job_handed()
    return ExitStatus.DONE if handed is None else _run_job(*handed)


def _run_job(folder: Path, handles: list[int]) -> int:
    job = JobFolder(folder)
    with Reporter(folder) as reporter, stopped_by_signals() as stop:
        try:
            if (note := use_cores()) is not None:
                reporter.message(note)
            from batchrun.runner.job_run import (  # noqa: PLC0415 - 18 MB that no supervisor needs
                run_job,
            )

            faulthandler.enable()
            faulthandler.register(TELL)
            end_with_lost_threads(lambda what: _lost(job, reporter, what))
            watchdog = Watchdog(
                stall_seconds(), lambda what, seconds: _stalled(job, reporter, what, seconds)
            )
            watchdog.start()
            outcome = run_job(
                folder,
                stop=stop,
                on_progress=reporter.update,
                log=reporter.message,
                story=Story(reporter.story),
                held=bool(handles),
                handles=handles,
                watchdog=watchdog,
                prompt_s=prompt_seconds(),
            )
        except Exception as error:
            if isinstance(error, StepFailed):
                reporter.message(str(error))
                _print_traceback(error)
                os.abort()  # a crash like others: its rows are suspects
            message, hint = explain(error, folder)
            if not isinstance(error, Fenced | LeaseHeld):
                with suppress(OSError):  # a full disk: the last words are in worker.log
                    job.set_state("failed", message, hint)
            if error.__cause__ is not None:
                with suppress(OSError):
                    _print_traceback(error.__cause__)
            print_error(message, hint)
            return ExitStatus.FAILED
    return STATUS.get(outcome, ExitStatus.FAILED)


@click.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("parent", type=int)
def run_worker_command(folder: Path, parent: int) -> int:
    """Compute rows for a job's run, the process that started this one."""
    handle, *_ = children.inherited()
    for number in (signal.SIGINT, signal.SIGTERM):  # the run is told, and tells its workers
        signal.signal(number, signal.SIG_IGN)
    children.end_with_parent(parent)
    from batchrun.fleet.worker import work_for  # noqa: PLC0415 - only a worker needs it

    faulthandler.enable()
    faulthandler.register(TELL)

    def end(what: str) -> None:
        tell(f"a worker of {folder.name}: {what}")
        os.abort()  # a crash: its rows are suspects

    end_with_lost_threads(end)
    watchdog = Watchdog(stall_seconds(), lambda what, s: end(f"{what} did not finish in {s:.0f} s"))
    watchdog.start()
    try:
        work_for(Connection(handle), watchdog)
    except Exception as error:  # the engine's, or a bug
        _print_traceback(error)
        end(str(error))
    return ExitStatus.DONE


def _print_traceback(error: BaseException) -> None:
    for part in traceback.format_exception(error):
        tell(*part.splitlines())


def _lost(job: JobFolder, reporter: Reporter, what: str) -> None:
    """End a run if one of its threads could not begin: others wait for it."""
    hint = "free memory, or raise its limits (batchrun doctor names them), then: batchrun resume"
    try:
        print_error(what, hint)  # first: there may be no memory for more
        reporter.message(what)
        job.set_state("failed", what, hint)
    finally:
        os._exit(ExitStatus.FAILED)


def _stalled(job: JobFolder, reporter: Reporter, what: str, seconds: float) -> None:
    """End a run that hangs; where each thread is goes into worker.log."""
    from batchrun.runner.engine_loop import ENGINE  # noqa: PLC0415

    reason = f"{what} did not finish in {seconds:.0f} s"
    reporter.message(reason)
    if what == ENGINE:
        os.abort()  # a crash like others: its rows are suspects
    faulthandler.dump_traceback()
    job.set_state("failed", reason, "check that its disk is still there, then: batchrun resume")
    os._exit(ExitStatus.FAILED)
