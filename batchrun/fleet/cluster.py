"""Workers on the machines of a Ray cluster: Ray places them, carries messages, ships the model.

    coordinator (this process)              a node
      RayWorkers  <-- calls of actors -->     Agent, an actor
                                                <-- sockets -->  workers, its processes

Nothing here listens on a network: Ray does, as its cluster is set up to.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from batchrun.errors import MachineError, sendable
from batchrun.fleet.agent import DISTRIBUTION, PIECE, Agent, Model, Node
from batchrun.fleet.messages import Failed, FromWorker, Lost, Setup, ToWorker
from batchrun.jobs.spec import JobSpec

_HEAR_S = 1.0  # that an agent waits for its workers to say something
_NO_ROOM_S = 30.0  # until users are told that the cluster has no room
_CLOSE_S = 3.0
_REACH_S = 10.0


def open_cluster(spec: JobSpec, log: Callable[[str], None]) -> tuple[RayWorkers, list[Setup]]:
    """Connect to a cluster.

    Returns:
        What starts workers there, and setups for as many as the job asks for.

    Raises:
        MachineError: There is no such cluster, or nothing in it that could compute.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = import_module("ray")  # an extra, and slow

    runtime = spec.runtime
    assert runtime.ray is not None
    local = {"include_dashboard": False} if runtime.ray == "local" else {}
    try:
        _check_reachable(
            os.environ.get("RAY_ADDRESS", "") if runtime.ray == "auto" else runtime.ray
        )
        ray.init(address=runtime.ray, logging_level="error", log_to_driver=True, **local)
    except Exception as error:  # of many types, by what is wrong
        found: BaseException = error
        while (before := found.__cause__ or found.__context__) is not None:
            found = before
        hint = "on one machine: ray start --head; on others: ray start --address HOST:6379"
        if isinstance(found, ray.exceptions.AuthenticationError):
            hint = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token"
        raise MachineError(
            f"the Ray cluster {runtime.ray} can't be reached: {_first(found)}", hint
        ) from error
    gpus, workers = _wanted(spec, ray.cluster_resources())
    of_each = max(1, math.ceil(gpus))
    setups, slots = [], {}
    for slot in range(workers):
        for i in range(of_each):
            device = f"cuda:{i}" if gpus else "cpu"
            name = f"ray:{slot}" + f"/{device}" * (of_each > 1)
            there = replace(spec, runtime=replace(runtime, device=device))
            threads = (runtime.cpus_per_worker or 1) if not gpus else 0
            setups.append(Setup(there, device, name, threads=threads))
            slots[name] = slot
    options = {"num_cpus": runtime.cpus_per_worker or 1, "num_gpus": gpus}
    return RayWorkers(ray, spec, options, slots, log), setups


def _check_reachable(address: str) -> None:
    """Fail at once where nobody listens: Ray would try for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


def _wanted(spec: JobSpec, resources: dict[str, float]) -> tuple[float, int]:
    """GPUs for each worker, and the number of workers: as asked for, or as the cluster has them."""
    runtime, there = spec.runtime, resources.get("GPU", 0)
    gpus = runtime.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if there else 0.0
    cpus = runtime.cpus_per_worker or 1
    fitting = int(there / gpus) if gpus else int(resources.get("CPU", 0) / cpus)
    workers = runtime.workers or fitting
    if not workers:
        raise MachineError(
            f"the Ray cluster has no room for a worker: it has {there:g} GPUs and "
            f"{resources.get('CPU', 0):g} CPUs, and a worker needs {gpus:g} and {cpus}",
            hint="--workers N waits until there is room; --gpus-per-worker 0 computes on CPUs",
        )
    return gpus, workers


@dataclass(eq=False)
class _Place:
    """An agent's place: the actor that has it now, and its workers."""

    actor: Any = None
    placed: bool = False  # whether Ray has found room for it
    workers: set[int] = field(default_factory=set)
    hearing: Any = None  # the call that returns what they say next
    told: list[Any] = field(default_factory=list)  # calls that may not have ended
    lock: threading.Lock = field(default_factory=threading.Lock)


class RayWorkers:
    """Workers that Ray's actors start: see `batchrun.fleet.processes.Workers`.

    Args:
        ray: The module, connected.
        spec: The job.
        options: What Ray reserves for each agent.
        slots: The agent that starts the workers of a setup, by the setup's name.
        log: Told what a user should know.
    """

    def __init__(
        self,
        ray: Any,
        spec: JobSpec,
        options: dict[str, Any],
        slots: dict[str, int],
        log: Callable[[str], None],
    ) -> None:
        self._ray, self._slots, self._log = ray, slots, log
        self._actor = ray.remote(concurrency_groups={"hear": 1, "tell": 1})(Agent).options(
            **options,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        self._wants = f"{options['num_gpus']:g} GPUs and {options['num_cpus']} CPUs"
        self._places = {slot: _Place() for slot in set(slots.values())}
        self._of: dict[int, _Place] = {}
        self._inbox: SimpleQueue[tuple[int, FromWorker]] = SimpleQueue()
        self._models = _models_of(spec)
        self._parcel = _Parcel(ray)
        self._began, self._told_of_room = time.monotonic(), False

    def start(self, worker: int, setup: Setup) -> None:
        """See `Workers.start`."""
        place = self._of[worker] = self._places[self._slots[setup.name]]
        place.workers.add(worker)
        threading.Thread(target=self._bring_up, args=(place, worker, setup), daemon=True).start()

    def send(self, worker: int, message: ToWorker) -> None:
        """See `Workers.send`."""
        place = self._of[worker]
        if worker in place.workers and place.actor is not None:
            tell = place.actor.tell.options(concurrency_group="tell")
            place.told.append(tell.remote([(worker, message)]))

    def poll(self, timeout: float) -> Sequence[tuple[int, FromWorker]]:
        """See `Workers.poll`."""
        self._tell_of_room()
        found = [*self._drained()]
        by_call = {p.hearing: p for p in self._places.values() if p.hearing is not None}
        if found or not by_call:
            if not found:
                with suppress(Empty):
                    found.append(self._inbox.get(timeout=timeout))
            return self._current(found)
        ready, _ = self._ray.wait([*by_call], timeout=timeout)
        if ready:
            ready, _ = self._ray.wait([*by_call], num_returns=len(by_call), timeout=0)
        for call in ready:
            place = by_call[call]
            try:
                found += self._ray.get(call)
                self._check_told(place)
                place.hearing = self._hear(place)
            except self._ray.exceptions.RayError as error:
                found += self._lost(place, error)
        return self._current(found)

    def _check_told(self, place: _Place) -> None:
        """Raise what went wrong with messages to an agent: rows in them would never end."""
        if place.told:
            many = len(place.told)
            ended, place.told = self._ray.wait(place.told, num_returns=many, timeout=0)
            self._ray.get(ended)

    def end(self, worker: int, *, at_once: bool = False) -> None:
        """See `Workers.end`."""
        place = self._of[worker]
        if worker in place.workers:
            place.workers.discard(worker)
            if place.actor is not None:
                place.actor.end.options(concurrency_group="tell").remote(worker, at_once)

    def close(self) -> None:
        """See `Workers.close`."""
        up = [place.actor for place in self._places.values() if place.hearing is not None]
        with suppress(Exception):  # their processes end with them in any case
            ended = [actor.close.remote() for actor in up]
            self._ray.wait(ended, num_returns=max(1, len(ended)), timeout=_CLOSE_S)
        for place in self._places.values():
            if place.actor is not None:
                with suppress(Exception):
                    self._ray.kill(place.actor)
        self._ray.shutdown()

    def _bring_up(self, place: _Place, worker: int, setup: Setup) -> None:
        """Start a worker, after its agent, and what its node lacks of the model. In a thread."""
        actor = None
        try:
            with place.lock:  # the workers of a node come up one after the other
                if place.actor is None:
                    place.actor = self._actor.remote()
                actor = place.actor
                self._ray.get(actor.__ray_ready__.remote())  # it has room
                place.placed = True
                node: Node = self._ray.get(actor.look.remote(self._models))
                _check(node)
                paths = [
                    path or self._parcel.ship(actor, model)
                    for path, model in zip(node.paths, self._models, strict=True)
                ]
                there = _with_paths(setup, paths)
                self._ray.get(actor.start.remote(worker, there))
                if place.hearing is None:
                    place.hearing = self._hear(place)
        except self._ray.exceptions.RayActorError as error:
            if place.actor is actor:
                for said in self._lost(place, error):
                    self._inbox.put(said)
        except Exception as error:
            cause = getattr(error, "cause", None)
            real = cause if isinstance(cause, Exception) else error
            self._inbox.put((worker, Failed(sendable(real))))

    def _hear(self, place: _Place) -> Any:
        return place.actor.hear.options(concurrency_group="hear").remote(_HEAR_S)

    def _lost(self, place: _Place, error: Exception) -> Iterator[tuple[int, FromWorker]]:
        """Say that an agent's workers are lost with it."""
        with suppress(Exception):  # it may live, and have no rows any more
            self._ray.kill(place.actor)
        place.actor, place.placed, place.hearing, place.told = None, False, None, []
        workers, place.workers = place.workers, set()
        for worker in workers:
            yield worker, Lost(f"was lost with its agent ({type(error).__name__})")

    def _drained(self) -> Iterator[tuple[int, FromWorker]]:
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _current(self, said: list[tuple[int, FromWorker]]) -> list[tuple[int, FromWorker]]:
        """Without what was said for workers that are gone; one that is `Lost` is gone from then."""
        found = []
        for worker, message in said:
            gone = isinstance(message, Lost)
            if worker in self._of[worker].workers or gone:
                found.append((worker, message))
            if gone:
                self._of[worker].workers.discard(worker)
        return found

    def _tell_of_room(self) -> None:
        """Say, once, how many workers wait for room."""
        if self._told_of_room or time.monotonic() < self._began + _NO_ROOM_S:
            return
        waiting = sum(len(place.workers) for place in self._places.values() if not place.placed)
        if waiting:
            self._told_of_room = True
            free = self._ray.available_resources()
            self._log(
                f"{waiting} of {len(self._slots)} workers wait for room in the Ray cluster: each "
                f"needs {self._wants}, and {free.get('GPU', 0):g} GPUs and "
                f"{free.get('CPU', 0):g} CPUs are free"
            )


class _Parcel:
    """A model's files in Ray's object store, put there once, for all nodes that lack them."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._lock = threading.Lock()
        self._pieces: dict[str, list[tuple[str, int, Any]]] = {}

    def ship(self, actor: Any, model: Model) -> str:
        """Send a model to an agent's node; return its folder there."""
        with self._lock:
            if model.fingerprint not in self._pieces:
                self._pieces[model.fingerprint] = list(self._packed(Path(model.path)))
        for name, offset, piece in self._pieces[model.fingerprint]:
            self._ray.get(actor.receive.remote(model, name, offset, piece))
        folder: str = self._ray.get(actor.accept.remote(model))
        return folder

    def _packed(self, folder: Path) -> Iterator[tuple[str, int, Any]]:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, offset = path.relative_to(folder).as_posix(), 0
            with path.open("rb") as file:
                while (piece := file.read(PIECE)) or not offset:
                    yield name, offset, self._ray.put(piece)
                    offset += max(1, len(piece))


def _models_of(spec: JobSpec) -> list[Model]:
    model, runtime, trusted = spec.model, spec.runtime, spec.model.trust_remote_code
    found = [Model(model.name, model.path, model.fingerprint, trusted)]
    if runtime.draft_model is not None:
        draft = runtime.draft_path, runtime.draft_fingerprint
        found.append(Model(runtime.draft_model, *draft, trusted))
    return found


def _with_paths(setup: Setup, paths: Sequence[str]) -> Setup:
    """The setup, with the models where its node has them."""
    spec = replace(setup.spec, model=replace(setup.spec.model, path=paths[0]))
    if len(paths) > 1:
        spec = replace(spec, runtime=replace(spec.runtime, draft_path=paths[1]))
    return setup._replace(spec=spec)


def _check(node: Node) -> None:
    if node.version != (here := version(DISTRIBUTION)):
        raise MachineError(
            f"the node {node.host} has {DISTRIBUTION} {node.version}, and {platform.node()} {here}",
            hint=f"on that node: pip install {DISTRIBUTION}=={here}",
        )


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
