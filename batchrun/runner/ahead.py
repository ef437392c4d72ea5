"""Processes that are started before there is a job for them, so that they import torch meanwhile.

    submit ──┬─ checks the job ──────────── hands it ─> supervisor ── hands it ─> run
             └─ starts ─> supervisor ─ starts ─> run: imports torch, which takes seconds

Whoever waits ends when nobody can hand it a job any more. If one can't be started, or ends early,
its job gets a process of its own, which says why it can't run.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import Popen

from batchrun import children

_LARGEST = 1 << 16  # bytes of a job's path
_HANDLES = 64
_LOOK_S = 0.2
_STDIN, _STDOUT, _STDERR = range(3)


class Ahead:
    """A child that waits for its job with `job_handed`; without one, nobody waits.

    The end of a block ends it, unless it has its job.

    Args:
        command: The command that it runs; with None, or if it can't be started, there is no child.
        session: Whether it leads a session of its own.
    """

    def __init__(self, command: str | None = None, *, session: bool = False) -> None:
        self._waiting: tuple[Popen[bytes], socket.socket] | None = None
        if command is None:
            return
        with suppress(OSError), ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(ours.close)
            with theirs:
                process = Popen(
                    children.command(command, "--parent", os.getpid()),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=session,
                    **children.inheriting(),
                )
            stack.pop_all()
            self._waiting = process, ours

    def hand(
        self,
        job: Path,
        handles: Sequence[int],
        *,
        log: int = _STDOUT,
        patience: float = float("inf"),
        stop: Callable[[], bool] = lambda: False,
    ) -> Popen[bytes] | None:
        """Hand it its job, and wait until it has taken it.

        Args:
            job: The job's folder.
            handles: What it holds from now on.
            log: Where its output goes; by default where this process's does.
            patience: Seconds after which it is ended instead.
            stop: Asked several times a second; ends it too.

        Returns:
            Its process; None if nobody waits, or it has ended.
        """
        if self._waiting is None:
            return None
        process, channel = self._waiting
        with suppress(OSError):  # it has ended
            socket.send_fds(channel, [os.fsencode(job)], [log, *handles])
            until = time.monotonic() + patience
            while not stop() and time.monotonic() < until:
                if select.select([channel], [], [], _LOOK_S)[0]:
                    if not channel.recv(1):
                        break  # likewise
                    channel.close()
                    self._waiting = None
                    return process
        self.end()
        return None

    def end(self) -> None:
        """End it if it has no job yet."""
        if self._waiting is not None:
            process, channel = self._waiting
            self._waiting = None
            channel.close()
            process.kill()
            process.wait()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def job_handed() -> tuple[Path, list[int]] | None:
    """Wait in a child for its job.

    Returns:
        The job's folder, and the handles that came with it; None if the parent has ended, or has no
        job for it.
    """
    with socket.socket(fileno=os.dup(_STDIN)) as channel, open(os.devnull, "rb") as nothing:
        path, handles, flags, _ = socket.recv_fds(channel, _LARGEST, _HANDLES)
        if not handles or flags & socket.MSG_CTRUNC:  # or there was no room for all of them
            return None
        log, *held = handles
        for handle, number in ((nothing.fileno(), _STDIN), (log, _STDOUT), (log, _STDERR)):
            os.dup2(handle, number)
        os.close(log)
        children.keep(held)
        children.outlive_parent()
        with suppress(OSError):  # the parent has just ended
            channel.send(b".")
    return Path(os.fsdecode(path)), held
