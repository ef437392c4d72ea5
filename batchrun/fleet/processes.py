"""Workers that are processes of this machine, each reached over a pair of sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from subprocess import Popen, TimeoutExpired
from typing import Protocol

from batchrun.cgroups import oom_kills
from batchrun.children import FAULTS, command, inheriting
from batchrun.errors import MachineError
from batchrun.fleet.messages import FromWorker, Lost, Setup, ToWorker
from batchrun.jobs.inflight import InFlightRows

_END_S = 5.0  # for a worker that was told to end


class Workers(Protocol):
    """Starts workers and carries messages. Workers have numbers, each used once."""

    def start(self, worker: int, setup: Setup) -> None:
        """Begin to start one; whether it comes up is learned from `poll`."""

    def send(self, worker: int, message: ToWorker) -> None:
        """Send a message, without waiting. One to a worker that has ended is dropped."""

    def poll(self, timeout: float) -> Sequence[tuple[int, FromWorker]]:
        """What workers have said, in order of each; waits for the first up to a timeout.

        A worker that has ended without a word is `Lost`; nothing comes from it afterwards.
        """

    def end(self, worker: int, *, at_once: bool = False) -> None:
        """Return when a worker has ended that was told to; `at_once`, end it by force."""

    def close(self) -> None:
        """End all workers, and return when they have ended."""


class Processes:
    """Workers as processes that end with this one.

    Args:
        folder: A job's folder, which is part of their command lines.
        handles: Locks that they hold as long as they live.
    """

    def __init__(self, folder: Path, handles: Sequence[int] = ()) -> None:
        self._folder, self._handles = folder, tuple(handles)
        self._live: dict[int, _Process] = {}

    def start(self, worker: int, setup: Setup) -> None:
        """See `Workers.start`."""
        self._live[worker] = _Process(self._folder, self._handles, setup)

    def send(self, worker: int, message: ToWorker) -> None:
        """See `Workers.send`."""
        if (process := self._live.get(worker)) is not None:
            process.outbox.put(message)

    def wait(self, timeout: float) -> None:
        """Wait until a worker has said something, or up to a timeout. Any thread may call it."""
        waiting = [process.connection for process in list(self._live.values())]
        with suppress(OSError, ValueError):  # one was closed meanwhile
            if not wait(waiting, timeout) and not waiting:
                time.sleep(timeout)

    def poll(self, timeout: float) -> Sequence[tuple[int, FromWorker]]:
        """See `Workers.poll`."""
        by_connection = {p.connection: worker for worker, p in self._live.items()}
        found: list[tuple[int, FromWorker]] = []
        for ready in wait([*by_connection], timeout):
            assert isinstance(ready, Connection)
            worker = by_connection[ready]
            try:
                found.append((worker, ready.recv()))
            except (EOFError, OSError):
                found.append((worker, self._live.pop(worker).ended()))
        return found

    def end(self, worker: int, *, at_once: bool = False) -> None:
        """See `Workers.end`."""
        if (process := self._live.pop(worker, None)) is not None:
            process.end(at_once=at_once)

    def close(self) -> None:
        """See `Workers.close`."""
        for process in self._live.values():
            process.kill()
        for worker in [*self._live]:
            self.end(worker)


class _Process:
    def __init__(self, folder: Path, handles: tuple[int, ...], setup: Setup) -> None:
        self._notes = Path(setup.notes)
        self._oom_kills = oom_kills()
        self.connection, theirs = Pipe()
        try:
            self._process = Popen(
                command("run-worker", folder, os.getpid()),
                stdin=subprocess.DEVNULL,
                **inheriting(theirs.fileno(), *handles),
            )
        except OSError as error:
            self.connection.close()
            raise MachineError(f"a worker can't be started: {error.strerror or error}") from error
        finally:
            theirs.close()
        # A worker that is stopped takes no messages: waiting for it must not hold up the others.
        self.outbox: SimpleQueue[ToWorker | None] = SimpleQueue()
        self.outbox.put(setup)
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._sender.start()

    def _send(self) -> None:
        with suppress(OSError):
            while (message := self.outbox.get()) is not None:
                self.connection.send(message)

    def ended(self) -> Lost:
        """How it ended, once its socket is closed."""
        self.outbox.put(None)
        try:
            code = self._process.wait(_END_S)
        except TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._sender.join()
        self.connection.close()
        if code >= 0:
            return Lost(f"ended with exit code {code}")
        name = signal.Signals(-code).name
        if -code in FAULTS:
            with closing(InFlightRows(self._notes)) as running:
                return Lost(f"crashed with {name}", crashed=True, suspects=tuple(running.rows()))
        if name == "SIGKILL" and oom_kills() > self._oom_kills:
            return Lost(f"was killed by {name}: the machine ran out of memory", for_good=True)
        return Lost(f"was killed by {name}")

    def kill(self) -> None:
        """End it by force."""
        self._process.kill()

    def end(self, *, at_once: bool) -> None:
        """Wait until it has ended, not for ever."""
        self.outbox.put(None)
        if at_once:
            self.kill()
        try:
            self._process.wait(_END_S)
        except TimeoutExpired:
            self.kill()
            self._process.wait()
        self._sender.join()
        self.connection.close()
