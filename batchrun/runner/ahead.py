"""Processes that are started before there is a job for them, so that they import torch meanwhile.

    submit ──┬─ checks the job ──────────── hands it ─> supervisor ── hands it ─> run
             └─ starts ─> supervisor ─ starts ─> run: imports torch, which takes seconds

Whoever waits ends when nobody can hand it a job any more. If one can't be started, or ends early,
its job gets a process of its own, which says why it can't run.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import Popen

from batchrun import children

_LARGEST = 1 << 16  # bytes of a job's path
_HANDLES = 64
_TAKES_S = 60.0  # to import everything
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

    def hand(self, job: Path, log: int, handles: Sequence[int]) -> Popen[bytes] | None:
        """Hand it its job, and wait until it has taken it.

        Args:
            job: The job's folder.
            log: Where its output goes.
            handles: What it holds from now on.

        Returns:
            Its process; None if it has ended, or has had a job.
        """
        if not self._waits:
            return None
        try:
            socket.send_fds(self._socket, [os.fsencode(job)], [log, *handles])
            self._socket.settimeout(_TAKES_S)
            taken = bool(self._socket.recv(1))
        except OSError:
            taken = False
        if not taken:
            self.end()
            return None
        self._socket.close()
        return self._process

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
        path, handles, _, _ = socket.recv_fds(channel, _LARGEST, _HANDLES)
        if not handles:
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
