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
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

from batchrun import children

_LARGEST = 1 << 16  # bytes of a job's path
_HANDLES = 64
_LOOK_S = 0.2
_STDIN, _STDOUT, _STDERR = range(3)


class Ahead:
    """A child that waits for its job with `job_handed`.

    Args:
        command: The command that it runs.
        session: Whether it leads a session of its own.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self, command: str, *, session: bool = False) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = Popen(
                    children.command(command, "--parent", os.getpid()),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=session,
                    **children.inheriting(),
                )
        except OSError:
            self._socket.close()
            raise

    def hand(
        self,
        job: Path,
        log: int,
        handles: Sequence[int],
        *,
        patience: float = float("inf"),
        stop: Callable[[], bool] = lambda: False,
    ) -> Popen[bytes] | None:
        """Hand it its job, and wait until it has taken it.

        Args:
            job: The job's folder.
            log: Where its output goes.
            handles: What it holds from now on.
            patience: Seconds after which it is ended instead.
            stop: Asked several times a second; ends it too.

        Returns:
            Its process; None if it has ended, or has had a job.
        """
        if not self._waits:
            return None
        try:
            socket.send_fds(self._socket, [os.fsencode(job)], [log, *handles])
            until = time.monotonic() + patience
            while not stop() and time.monotonic() < until:
                if select.select([self._socket], [], [], _LOOK_S)[0]:
                    if not self._socket.recv(1):
                        break  # it has ended
                    self._socket.close()
                    return self._process
        except OSError:
            pass
        self.end()
        return None

    def end(self) -> None:
        """End it if it has no job yet."""
        if self._waits:
            self._socket.close()
            self._process.kill()
            self._process.wait()

    @property
    def _waits(self) -> bool:
        return int(self._socket.fileno()) >= 0


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
