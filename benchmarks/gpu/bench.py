"""What every part of the check shares: the device, the sizes, the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.shapes import SHAPES, Shape


class Unavailable(Exception):  # noqa: N818 - says what there is none of
    """What a part needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Bench:
    """How a part is to measure.

    Args:
        toy: On the CPU and at toy sizes: the rehearsal.
        attention: Name of the attention backend.
        limit: Seconds that the part has.
    """

    toy: bool
    attention: str
    limit: float
    began: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """A torch device."""
        return "cpu" if self.toy else "cuda"

    @property
    def left(self) -> float:
        """Seconds before the part is ended from outside."""
        return self.limit - (time.monotonic() - self.began)

    def shape(self, name: str) -> Shape:
        """The shape of that name, or the toy."""
        return SHAPES["toy" if self.toy else name]

    def size(self, full: int, toy: int) -> int:
        """A size, by whether this is the rehearsal."""
        return toy if self.toy else full

    def synchronise(self) -> None:
        """Wait for the device."""
        if not self.toy:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object], *, repeat: int = 10, warmup: int = 2) -> float:
        """Median seconds of a call on the device: by events there, by the clock on a CPU."""
        for _ in range(warmup):
            call()
        if self.toy:
            return statistics.median(_clocked(call) for _ in range(repeat))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeat)]
        for begin, end in zip(events[::2], events[1::2], strict=True):
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        pairs = zip(events[::2], events[1::2], strict=True)
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)


def _clocked(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
