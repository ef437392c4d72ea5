"""How data get to the device and back: directly on the host, on separate streams on CUDA.

    up stream       | up n+1 |           | up n+2 |
    copy stream     | KV copies |
    down stream                 | down n |           | down n+1 |
    compute stream  |  step n   |  step n+1          |  step n+2           |
    host               plan n+1, map, launch   plan n+2, map, launch

Events order a step's uploads before its kernels and its download after them. For the host, a step
is over only when its own kernels have ended, whether or not it sends anything back; after that its
staging memory may be reused, and the pages that it read may be unmapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 256  # bytes, as cudaMalloc aligns
_DTYPES = {
    np.bool_: torch.bool,
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.float32: torch.float32,
    np.float64: torch.float64,
}


def _first(memory: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first numbers of `memory`, as many as `numbers` has and in its shape."""
    return memory.view(-1)[: numbers.numel()].view(numbers.shape)


def copied(
    array: np.ndarray[Any, Any],
    to: torch.Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """As `Transfers.upload`, but complete when it returns."""
    sent = torch.from_numpy(array.copy()).to(device)
    return sent if to is None else _first(to, sent).copy_(sent)


class Download:
    """The end of a step, and numbers on their way to the host; here they are already there."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._tensors = tensors

    def get(self) -> list[list[Any]]:
        """Wait until the step has ended; returns a list of numbers for each tensor, if any."""
        return [tensor.tolist() for tensor in self._tensors]


class Transfers:
    """Moves a step's inputs to the device and its tokens back; here each copy is synchronous.

    On a CPU there is nothing to wait for, as the host is the device.

    Attributes:
        on_host: Whether the host is the device.
        device_seconds: Time the device has spent in steps; 0 on the host.
        idle_seconds: Time between the end of a step and the start of the next; 0 on the host.
    """

    on_host = True
    device_seconds = 0.0
    idle_seconds = 0.0

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    @contextmanager
    def step(self, *, more: bool = False) -> Iterator[None]:
        """Issue the uploads, kernels and download of one step in this context.

        Args:
            more: Whether this continues the step issued last.
        """
        yield

    @contextmanager
    def copying(self, *, beside: bool) -> Iterator[None]:
        """Issue copies on the device that precede this step's kernels.

        Args:
            beside: Whether they need not wait for earlier steps, which may still run.
        """
        yield

    def upload(self, array: np.ndarray[Any, Any], to: torch.Tensor | None = None) -> torch.Tensor:
        """Copy an array to the device without waiting for it.

        Everything uploaded before `started` is sent in one copy, and is there for the kernels after
        it.

        Args:
            array: May be reused at once.
            to: Destination of the same dtype, with at least as many numbers; None for memory that
                is valid for this step's kernels.

        Returns:
            The numbers on the device, in the array's shape.
        """
        return copied(array, to, device=self._device)

    def started(self) -> None:
        """All of the step's inputs are uploaded: its kernels come next."""

    def download(self, *tensors: torch.Tensor) -> Download:
        """Fetch tensors once the kernels so far have run; once per step, even without tensors."""
        return Download(tensors)

    def busy(self) -> bool:
        """Whether kernels of a step are running or waiting to."""
        return False

    def drain(self) -> None:
        """Wait for everything in flight, and reset the times."""


class _Stage:
    """Staging memory of one step: pinned on the host, and as much on the device."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.bytes: np.ndarray[Any, Any] = self.host.numpy()
        self.device = torch.empty(size, dtype=torch.uint8, device=device)
        self.back = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.begin = torch.cuda.Event(enable_timing=True)
        self.sent = torch.cuda.Event()
        self.computed = torch.cuda.Event()
        self.arrived = torch.cuda.Event(blocking=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.launched = False
        self.clear()

    def clear(self) -> None:
        """Start over: nothing of the previous step is in flight."""
        self.used = self.gone = 0  # bytes filled, and bytes of those already sent
        self.larger: list[torch.Tensor] = []  # uploads that did not fit, kept alive as long
        self.moves: list[tuple[torch.Tensor, torch.Tensor]] = []  # to make after the upload
        self.gathering = True


class CudaTransfers(Transfers):
    """Streams and a ring of staging buffers: see `Transfers`.

    Args:
        device: A CUDA device.
        lag: Steps that may be in flight when the next one is launched.
        size: Bytes of staging per step; larger steps allocate more.
    """

    on_host = False

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
    def step(self, *, more: bool = False) -> Iterator[None]:
        """See `Transfers.step`."""
        if not more:
            self._begin_stage()
        stage = self._stage
        with torch.cuda.stream(self.compute):
            if not more:
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

    def upload(self, array: np.ndarray[Any, Any], to: torch.Tensor | None = None) -> torch.Tensor:
        """See `Transfers.upload`."""
        stage, array = self._stage, np.ascontiguousarray(array)
        begin, end = stage.used, stage.used + array.nbytes
        if end > len(stage.bytes):
            sent = self._upload_apart(array)
        else:
            stage.used = -(-end // _ALIGNMENT) * _ALIGNMENT
            stage.bytes[begin:end] = array.reshape(-1).view(np.uint8)
            dtype = _DTYPES[array.dtype.type]
            sent = stage.device[begin:end].view(dtype).view(array.shape)
        if to is not None:
            kept = _first(to, sent)
            stage.moves.append((kept, sent))
            sent = kept
        if not stage.gathering:
            self._send()
        return sent

    def started(self) -> None:
        """See `Transfers.started`."""
        self._send()
        self._stage.gathering = False
        self._stage.begin.record(self.compute)

    def download(self, *tensors: torch.Tensor) -> Download:
        """See `Transfers.download`."""
        stage, used = self._stage, 0
        hosts = []
        for tensor in tensors:
            end = used + tensor.nbytes
            if end > stage.back.numel():
                hosts.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
            else:
                hosts.append(stage.back[used:end].view(tensor.dtype).view(tensor.shape))
                used = -(-end // _ALIGNMENT) * _ALIGNMENT
        if tensors:
            stage.computed.record(self.compute)
            self._down.wait_event(stage.computed)
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

    def _begin_stage(self) -> None:
        stage = self._stage = self._stages[self._steps % len(self._stages)]
        self._steps += 1
        if stage.launched:
            stage.end.synchronize()  # returns at once: that step was collected
        stage.clear()
        stage.launched = True

    def _upload_apart(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Send an array that does not fit into the staging memory, through memory of its own."""
        stage, source = self._stage, torch.from_numpy(array)
        host = torch.empty_like(source, pin_memory=True).copy_(source)
        target = torch.empty_like(source, device=stage.device.device)
        self._up.wait_stream(self.compute)  # its kernels may still use that memory
        stage.larger += [host, target]
        with torch.cuda.stream(self._up):
            target.copy_(host, non_blocking=True)
        self.compute.wait_stream(self._up)
        return target

    def _send(self) -> None:
        """Send what was staged but not sent yet, in one copy."""
        stage = self._stage
        part = slice(stage.gone, stage.used)
        if stage.gone < stage.used:
            with torch.cuda.stream(self._up):
                stage.device[part].copy_(stage.host[part], non_blocking=True)
                stage.sent.record(self._up)
            self.compute.wait_event(stage.sent)
            stage.gone = stage.used
        for kept, sent in stage.moves:
            kept.copy_(sent)
        stage.moves.clear()

    def _count(self, stage: _Stage) -> None:
        """Add the times of a step that has ended."""
        self.device_seconds += stage.begin.elapsed_time(stage.end) / 1e3
        if self._last_end is not None:
            self.idle_seconds += max(0.0, self._last_end.elapsed_time(stage.begin) / 1e3)
        self._last_end = stage.end


@dataclass
class _OnItsWay(Download):
    """A step's end, and its download; keeps the source tensors alive until they arrive."""

    transfers: CudaTransfers
    stage: _Stage
    sources: tuple[torch.Tensor, ...]
    hosts: list[torch.Tensor]

    def get(self) -> list[list[Any]]:
        """See `Download.get`."""
        if self.hosts:
            self.stage.arrived.synchronize()
        self.stage.end.synchronize()
        self.transfers._count(self.stage)
        return [host.tolist() for host in self.hosts]
