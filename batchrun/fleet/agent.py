"""What Ray starts on a node: a process that starts workers there, and passes messages on.

An agent survives a crash of its workers, so it can say which rows were in them. Nothing here
imports Ray: an agent is called by it.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from batchrun.errors import ModelError
from batchrun.fleet.messages import FromWorker, Setup, ToWorker
from batchrun.fleet.processes import Processes
from batchrun.jobs.files import make_folders
from batchrun.jobs.folder import home
from batchrun.models.resolve import fingerprint, resolve

DISTRIBUTION = "batchrun-llm"
PIECE = 64 << 20  # bytes of a file that travel at a time
_BATCH = 256  # messages


class Model(NamedTuple):
    """A model that a job needs.

    Attributes:
        name: What the user called it.
        path: Its folder, on the coordinator's machine.
        fingerprint: Of its content, wherever it is.
        trusted: Whether its own code may run.
    """

    name: str
    path: str
    fingerprint: str
    trusted: bool


class Node(NamedTuple):
    """Where an agent is.

    Attributes:
        host: The machine's name.
        version: That of batchrun.
        paths: Folders of the models here; None for each that is not here.
    """

    host: str
    version: str
    paths: tuple[str | None, ...]


class Agent:
    """Workers on one node."""

    def __init__(self) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="batchrun-agent-"))
        self._processes = Processes(self._scratch)
        self._lock = threading.Lock()
        # Workers end with the thread that started them.
        self._starter = ThreadPoolExecutor(1)

    def look(self, models: Sequence[Model]) -> Node:
        """Find models on this node: where the coordinator has them, shipped before, or by name."""
        return Node(platform.node(), version(DISTRIBUTION), tuple(map(_found, models)))

    def receive(self, model: Model, name: str, offset: int, piece: bytes) -> None:
        """Take in a part of a file of a model that is not here."""
        path = _arriving(model) / name
        make_folders(path.parent)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        with open(handle, "wb") as file:
            file.seek(offset)
            file.write(piece)

    def accept(self, model: Model) -> str:
        """Check a model that has arrived as a whole; return its folder.

        Raises:
            ModelError: It is not what was sent.
        """
        arrived, kept = _arriving(model), _kept(model)
        if (found := fingerprint(arrived)) != model.fingerprint:
            shutil.rmtree(arrived, ignore_errors=True)
            raise ModelError(
                f"the model {model.name} arrived at {platform.node()} with the fingerprint "
                f"{found[:12]} instead of {model.fingerprint[:12]}"
            )
        if kept.exists() and not _is(kept, model):
            shutil.rmtree(kept)
        with suppress(OSError):  # another agent of this node was faster
            arrived.rename(kept)
        shutil.rmtree(arrived, ignore_errors=True)
        return str(kept)

    def start(self, worker: int, setup: Setup) -> None:
        """Begin to start a worker."""
        notes = self._scratch / str(worker)
        make_folders(notes)
        self._starter.submit(self._start, worker, setup._replace(notes=str(notes))).result()

    def _start(self, worker: int, setup: Setup) -> None:
        with self._lock:
            self._processes.start(worker, setup)

    def tell(self, said: Iterable[tuple[int, ToWorker]]) -> None:
        """Send messages to workers."""
        for worker, message in said:
            self._processes.send(worker, message)

    def hear(self, timeout: float) -> list[tuple[int, FromWorker]]:
        """What workers have said; waits for the first up to a timeout."""
        self._processes.wait(timeout)
        found: list[tuple[int, FromWorker]] = []
        with self._lock:
            while len(found) < _BATCH and (more := self._processes.poll(0)):
                found += more
        return found

    def end(self, worker: int, at_once: bool) -> None:
        """End a worker."""
        with self._lock:
            self._processes.end(worker, at_once=at_once)

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            self._processes.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _found(model: Model) -> str | None:
    """Where this node has a model, by its content; None if it hasn't."""
    for path in (Path(model.path), _kept(model)):
        if _is(path, model):
            return str(path)
    with suppress(OSError, ModelError):
        found = resolve(model.name, home() / "models", trust_remote_code=model.trusted)
        if found.fingerprint == model.fingerprint:
            return str(found.path)
    return None


def _is(path: Path, model: Model) -> bool:
    """Whether a folder is that model."""
    with suppress(OSError, ModelError):
        return path.is_dir() and fingerprint(path) == model.fingerprint
    return False


def _kept(model: Model) -> Path:
    return home() / "models" / f"shipped-{model.fingerprint[:24]}"


def _arriving(model: Model) -> Path:
    return home() / "models" / f".shipping-{model.fingerprint[:24]}-{os.getpid()}"
