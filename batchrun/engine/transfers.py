"""How data reach the device and come back: at once on the host, on a stream of their own on CUDA.

    up stream       | up n+1 |           | up n+2 |
    copy stream     | KV copies |
    down stream                 | down n |           | down n+1 |
    compute stream  |  step n   |  step n+1          |  step n+2           |
    host               plan n+1, map, launch   plan n+2, map, launch

A step's uploads come before its kernels and its download after them, by events. A step is over for
the host only when its own kernels have ended, whether it sends anything back or not; from then on
its staging memory may be used again, and the pages that it read may go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

_ALIGNMENT = 256  # bytes, as cudaMalloc aligns


class Download(Protocol):
    """The end of a step, and numbers on their way to the host."""

    def get(self) -> list[list[Any]]:
        """Wait until the step has ended; a list of numbers for each tensor, maybe none."""


class Transfers(Protocol):
    """Moves a step's inputs to the device and its tokens back.

    Attributes:
        device_seconds: Time the device spent in steps, so far; 0 on the host.
        idle_seconds: Time between the end of a step and the begin of the next; 0 on the host.
    """

    device_seconds: float
    idle_seconds: float

    @contextmanager
    def step(self) -> Iterator[None]:
        """The uploads, kernels and download of one step are issued in this context."""
        yield

    @contextmanager
    def copying(self, *, beside: bool) -> Iterator[None]:
        """Copies on the device before this step's kernels.

        Args:
            beside: They need not wait for the steps before, which may still run.
        """
        yield

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Copy an array to the device without waiting for it.

        Returns:
            A tensor that is valid for the kernels of this step. The array is free at once.
        """

    def started(self) -> None:
        """The step's inputs are on their way: its kernels come next."""

    def download(self, *tensors: torch.Tensor) -> Download:
        """Fetch tensors once the kernels so far have run; once in each step, maybe of none."""

    def busy(self) -> bool:
        """Whether kernels of a step still run or wait to."""

    def drain(self) -> None:
        """Wait for everything under way, and count times anew."""


class _Arrived:
    """A download that was never away."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors = tensors

    def get(self) -> list[list[Any]]:
        return [tensor.tolist() for tensor in self._tensors]


class HostTransfers:
    """The host is the device: see `Transfers`."""

    device_seconds = 0.0
    idle_seconds = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """See `Transfers.step`."""
        yield

    @contextmanager
    def copying(self, *, beside: bool) -> Iterator[None]:
        """See `Transfers.copying`."""
        yield

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """See `Transfers.upload`."""
        return torch.from_numpy(array.copy())

    def started(self) -> None:
        """See `Transfers.started`."""

    def download(self, *tensors: torch.Tensor) -> Download:
        """See `Transfers.download`."""
        return _Arrived(tensors)

    def busy(self) -> bool:
        """See `Transfers.busy`."""
        return False

    def drain(self) -> None:
        """See `Transfers.drain`."""


class _Stage:
    """Staging memory of one step: pinned on the host and as much on the device."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(size, dtype=torch.uint8, device=device)
        self.used = 0
        self.larger: list[torch.Tensor] = []  # uploads that did not fit, kept for as long
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.arrived = torch.cuda.Event(blocking=True)
        self.launched = False


class CudaTransfers:
    """Two streams and a ring of staging buffers: see `Transfers`.

    Args:
        device: A CUDA device.
        lag: Steps that may be in flight when another one is launched.
        size: Bytes of staging for a step; larger steps allocate more.
    """

    def __init__(self, device: torch.device, lag: int, size: int = 4 << 20) -> None:
        self.compute = torch.cuda.Stream(device)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._copy = torch.cuda.Stream(device)
        self._stages = [_Stage(device, size) for _ in range(lag + 2)]
        self._stage = self._stages[0]
        self._steps = 0
        self._last_end: torch.cuda.Event | None = None
        self.device_seconds = 0.0
        self.idle_seconds = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """See `Transfers.step`."""
        stage = self._stage = self._stages[self._steps % len(self._stages)]
        self._steps += 1
        if stage.launched:
            stage.end.synchronize()  # long past: that step was collected
        stage.used, stage.larger, stage.launched = 0, [], True
        with torch.cuda.stream(self.compute):
            stage.begin.record(self.compute)
            yield
            stage.end.record(self.compute)

    @contextmanager
    def copying(self, *, beside: bool) -> Iterator[None]:
        """See `Transfers.copying`."""
        if not beside:
            self._copy.wait_stream(self.compute)
        with torch.cuda.stream(self._copy):
            yield
        self.compute.wait_stream(self._copy)

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """See `Transfers.upload`."""
        stage, source = self._stage, torch.from_numpy(np.ascontiguousarray(array))
        begin, size = stage.used, source.nbytes
        if begin + size > stage.host.numel():
            host = torch.empty_like(source, pin_memory=True).copy_(source)
            target = torch.empty_like(source, device=stage.device.device)
            self._up.wait_stream(self.compute)  # whose kernels may still use that memory
            stage.larger += [host, target]
        else:
            stage.used = -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT
            host = stage.host[begin : begin + size].view(source.dtype).view(source.shape)
            target = stage.device[begin : begin + size].view(source.dtype).view(source.shape)
            host.copy_(source)
        with torch.cuda.stream(self._up):
            target.copy_(host, non_blocking=True)
        self.compute.wait_stream(self._up)
        return target

    def started(self) -> None:
        """See `Transfers.started`."""
        self._stage.begin.record(self.compute)

    def download(self, *tensors: torch.Tensor) -> Download:
        """See `Transfers.download`."""
        stage = self._stage
        hosts = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        if tensors:
            self._down.wait_stream(self.compute)
            with torch.cuda.stream(self._down):
                for host, tensor in zip(hosts, tensors, strict=True):
                    host.copy_(tensor, non_blocking=True)
                stage.arrived.record(self._down)
        return _OnItsWay(self, stage, tensors, hosts)

    def busy(self) -> bool:
        """See `Transfers.busy`."""
        return self._steps > 0 and not self._stage.end.query()

    def drain(self) -> None:
        """See `Transfers.drain`."""
        for stream in (self.compute, self._up, self._down, self._copy):
            stream.synchronize()
        self.device_seconds = self.idle_seconds = 0.0
        self._last_end = None

    def _count(self, stage: _Stage) -> None:
        """Take the times of a step that has ended."""
        self.device_seconds += stage.begin.elapsed_time(stage.end) / 1e3
        if self._last_end is not None:
            self.idle_seconds += max(0.0, self._last_end.elapsed_time(stage.begin) / 1e3)
        self._last_end = stage.end


class _OnItsWay:
    """A step's end, and its download; keeps the sources alive until they have arrived."""

    def __init__(
        self,
        transfers: CudaTransfers,
        stage: _Stage,
        sources: tuple[torch.Tensor, ...],
        hosts: list[torch.Tensor],
    ) -> None:
        self._transfers, self._stage, self._sources, self._hosts = transfers, stage, sources, hosts

    def get(self) -> list[list[Any]]:
        if self._hosts:
            self._stage.arrived.synchronize()
        self._stage.end.synchronize()
        self._transfers._count(self._stage)
        return [host.tolist() for host in self._hosts]
