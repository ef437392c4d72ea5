"""Copies of a slow device: when what they read may change, and when what they write is there.

host to device   the source until the copy is over      the target for streams ordered behind
device to host   the source for streams not behind it   the target when the copy is over
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Done = Counter[Any]  # operations, by stream


@contextmanager
def aside() -> Iterator[None]:
    """Torch as it is, for the test's own work."""
    with torch.inference_mode(), torch._C.DisableTorchFunction():
        yield


class _Memory:
    """Where a tensor's numbers are, without keeping them there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._view = tensor.storage_offset(), tensor.shape, tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> torch.Tensor | None:
        """The tensor; None when its memory is free."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


@dataclass
class _Copy:
    stream: Any
    number: int  # of the operation on its stream
    source: _Memory
    target: torch.Tensor
    data: torch.Tensor  # the source, when it was enqueued
    from_host: bool
    to_host: bool
    seen: bool  # no other stream works behind its back any more
    read: bool = False  # the source may change
    written: bool = False  # the target is there

    def reads(self, written: torch.Tensor) -> bool:
        source = self.source.tensor()
        return source is not None and _meet(source, written)

    def is_before(self, moment: Done) -> bool:
        return bool(moment[self.stream] >= self.number)


class Copies:
    """All copies that are not over.

    Args:
        broken: Called with what is wrong.
    """

    def __init__(self, broken: Callable[[str], None]) -> None:
        self._broken = broken
        self._copies: list[_Copy] = []
        self._pinned: dict[int, torch.Tensor] = {}  # kept, so that no address is used again

    def pin(self, tensor: torch.Tensor) -> None:
        """A tensor in pinned memory of the host."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in pinned memory."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def enqueue(
        self, stream: Any, number: int, target: torch.Tensor, source: torch.Tensor, *, apart: bool
    ) -> None:
        """Copy as the given operation of a stream; `apart` from another one that goes on."""
        for before in self._copies:  # what it overwrites may have been read on its own stream
            if before.stream is stream and not before.from_host and before.reads(target):
                self._finish(before, source=True, target=False)
        hosts = self.is_pinned(source), self.is_pinned(target)
        copy = _Copy(stream, number, _Memory(source), target, source.clone(), *hosts, not apart)
        copy.read = not (apart or copy.from_host)
        copy.written = not copy.to_host
        if copy.to_host:
            _garble(target)
        else:
            target.copy_(source)
        self._copies.append(copy)

    def hide(self, stream: Any) -> None:
        """Other streams go on, and do not see yet what this one's copies have written."""
        with aside():
            for copy in self._copies:
                if copy.stream is stream and not copy.to_host and not copy.seen:
                    _garble(copy.target)
                    copy.written = False

    def ordered(self, stream: Any, after: Done) -> None:
        """The next operation of a stream comes after these."""
        with aside():
            for copy in self._copies:
                if copy.stream is not stream and not copy.seen and copy.is_before(after):
                    copy.seen = True
                    self._finish(copy, source=not copy.from_host, target=not copy.to_host)

    def over(self, done: Done) -> None:
        """These operations are over."""
        with aside():
            left = []
            for copy in self._copies:
                if copy.is_before(done):
                    self._finish(copy, source=True, target=True)
                else:
                    left.append(copy)
            self._copies = left

    def _finish(self, copy: _Copy, *, source: bool, target: bool) -> None:
        if source and not copy.read:
            copy.read = True
            now = copy.source.tensor()
            where = "pinned memory" if copy.from_host else "device memory"
            if now is None:
                self._broken(f"{where} was freed before it was copied")
            elif not _same(now, copy.data):
                self._broken(f"{where} was written before it was copied")
        if target and not copy.written:
            copy.written = True
            copy.target.copy_(copy.data)


def _garble(tensor: torch.Tensor) -> None:
    wrong = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    tensor.fill_(wrong)


def _meet(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, each without gaps, have a byte in common."""
    begins = one.data_ptr(), other.data_ptr()
    ends = begins[0] + one.nbytes, begins[1] + other.nbytes
    return max(begins) < min(ends)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    pair = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*pair)
