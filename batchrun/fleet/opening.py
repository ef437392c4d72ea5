"""From a job's specification to the workers that compute it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from batchrun import machine
from batchrun.fleet.cores import Share, shares
from batchrun.fleet.devices import devices_of
from batchrun.fleet.fleet import Fleet
from batchrun.fleet.messages import Setup
from batchrun.fleet.processes import Processes, Workers
from batchrun.jobs.files import make_folders
from batchrun.jobs.spec import JobSpec

NOTES = "workers"  # in a job's folder: what outlives a worker that crashes


def open_fleet(
    spec: JobSpec,
    log: Callable[[str], None],
    folder: Path,
    handles: Sequence[int],
    stopped: Callable[[], bool],
) -> Fleet:
    """Start a job's workers, and wait until one of them is ready, or no longer if it is stopped.

    Args:
        spec: The job.
        log: Told what a user should know.
        folder: The job's.
        handles: Locks that workers on this machine hold too.
        stopped: Whether the job is to end.

    Raises:
        ModelError: The model can't be used.
        EngineError, MachineError: There is no worker.
    """
    workers: Workers
    if spec.runtime.ray is not None:
        from batchrun.fleet.cluster import open_cluster  # noqa: PLC0415 - imports Ray

        workers, setups = open_cluster(spec, log)
    else:
        assert spec.runtime.devices is not None
        setups = local_setups(spec, folder / NOTES, devices_of(spec.runtime.devices))
        workers = Processes(folder, handles)
    fleet = Fleet(spec, workers, setups, log)
    try:
        fleet.open(stopped)
    except BaseException:
        fleet.close()
        raise
    return fleet


def local_setups(spec: JobSpec, notes: Path, devices: Sequence[str]) -> list[Setup]:
    """Setups for workers on devices of this machine.

    Workers on the CPU share its cores; those of GPUs may run on any.
    """
    on_cpu, allowed = Counter(devices)["cpu"], machine.affinity()
    divided = iter(shares(on_cpu, allowed) if on_cpu > 1 else [Share((), None)] * on_cpu)
    threads = max(1, machine.cores() // on_cpu) if on_cpu > 1 else 0
    setups = []
    for i, device in enumerate(devices):
        place = notes / str(i)
        make_folders(place)
        runtime = replace(spec.runtime, device=device)
        setup = Setup(replace(spec, runtime=runtime), device, device, notes=str(place))
        if device == "cpu":
            share = next(divided)
            name = f"cpu:{i}" if on_cpu > 1 else device
            setup = setup._replace(name=name, cpus=share.cpus, node=share.node, threads=threads)
        setups.append(setup)
    return setups
