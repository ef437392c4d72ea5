"""What the devices that a user names are on this machine. Loads no torch."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace

from batchrun import machine
from batchrun.allocator.cuda import Driver
from batchrun.allocator.vmm import AllocatorError
from batchrun.errors import MachineError
from batchrun.jobs.runtime import RuntimeSpec

INSTALL = "pip install 'batchrun-llm[ray]'"


def devices_of(named: str) -> list[str]:
    """The devices, one for each worker: `cuda:0`, `cuda:1`; or `cpu`, several times.

    Args:
        named: As `--devices` has it.

    Raises:
        MachineError: One is not there, or there are not as many cores.
    """
    kind, _, number = named.partition(":")
    if kind == "cpu":
        if int(number) > (cores := machine.cores()):
            raise MachineError(
                f"--devices {named}: this machine has only {cores} cores",
                hint=f"use --devices cpu:{cores}, or fewer workers",
            )
        return ["cpu"] * int(number)
    count, problem = _count_gpus()
    if named == "all":
        return [f"cuda:{i}" for i in range(count)] or ["cpu"]
    wanted = named.split(",")
    for device in wanted:
        if int(device.removeprefix("cuda:")) >= count:
            there = f"the devices are cuda:0 to cuda:{count - 1}" if count else problem
            raise MachineError(
                f"the device {device} can't be used: {there}",
                hint="batchrun doctor shows the devices; --devices all uses all of them",
            )
    return wanted


def one_engine(runtime: RuntimeSpec) -> tuple[RuntimeSpec, int]:
    """How one of a job's engines runs, as far as this machine can tell, and how many there are.

    Raises:
        MachineError: A device is not there.
    """
    if runtime.ray is not None:
        on_cpu = runtime.gpus_per_worker == 0
        engines = (runtime.workers or 1) * max(1, math.ceil(runtime.gpus_per_worker or 1))
        return replace(runtime, device="cpu" if on_cpu else "auto"), engines
    if runtime.devices is not None:
        devices = devices_of(runtime.devices)
        return replace(runtime, device=devices[0]), len(devices)
    return runtime, 1


def check_ray() -> None:
    """Refuse a job for Ray where Ray is not installed.

    Raises:
        MachineError: It isn't.
    """
    if importlib.util.find_spec("ray") is None:
        raise MachineError("--ray needs Ray, which is not installed", hint=INSTALL)


def _count_gpus() -> tuple[int, str]:
    """How many GPUs this process may use, and why there are none."""
    try:
        return int(Driver().call("cuDeviceGetCount")), "there is no GPU"
    except AllocatorError as error:
        return 0, str(error)
