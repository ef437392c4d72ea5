"""A CUDA device for tests that is as slow as CUDA allows, on a CPU.

Kernels compute when they are launched, but whoever may look at their work sooner than the device
promises it sees garbage: the host until it has waited, other streams until they are ordered behind.

Time is a count of operations on each stream. `Stream.after[s]` says how many operations of `s` come
before the stream's next one, and `SlowDevice.done[s]` how many are over: those that somebody waited
for, and what they waited for in turn, and no more (vector clocks: Fidge 1988, Mattern 1989). A
device that is `early` now and then finishes more than it was asked for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from tests.slow_device.copies import Copies, aside
from tests.slow_device.steps import Steps


class TooEarlyError(AssertionError):
    """The host or another stream did not wait for what it had to."""


class Stream:
    """Operations in order."""

    def __init__(self, device: SlowDevice, *_: Any, **__: Any) -> None:
        self._device = device
        self.after: Counter[Stream] = Counter()
        device.streams.append(self)

    def enqueue(self) -> int:
        """Add an operation. Returns its number."""
        self.after[self] += 1
        return self.after[self]

    def wait_stream(self, other: Stream) -> None:
        self.after |= other.after
        self._device.copies.ordered(self, self.after)

    def wait_event(self, event: Event) -> None:
        self.after |= event.at
        self._device.copies.ordered(self, self.after)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._device)
        event.record(self)
        return event

    def query(self) -> bool:
        return self._device.is_over(self.after)

    def synchronize(self) -> None:
        self._device.wait(self.after)


class Event:
    """A place between a stream's operations; one that was never recorded is over."""

    def __init__(
        self, device: SlowDevice, enable_timing: bool = False, blocking: bool = False
    ) -> None:
        self._device, self._timing = device, enable_timing
        self.at: Counter[Stream] = Counter()
        self._time = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self._device.current
        self._time = self._device.tick()
        stream.enqueue()
        self.at = stream.after.copy()
        self._device.recorded(self.at)

    def query(self) -> bool:
        return self._device.is_over(self.at)

    def synchronize(self) -> None:
        self._device.wait(self.at)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._device.current).wait_event(self)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, one for each event that was recorded in between."""
        for event in (self, end):
            if not event._timing or not event.at:
                raise torch.AcceleratorError("CUDA error: invalid resource handle")
            if not event.at <= self._device.done:
                raise torch.AcceleratorError("CUDA error: device not ready")
        return float(end._time - self._time)


class SlowDevice:
    """Streams, events and copies that take for ever.

    Args:
        early: How likely the device is to finish something on its own, each time that an event is
            recorded or asked.
        seed: Of what it finishes then.

    Attributes:
        current: The stream that work goes to.
        done: Operations that are over, by stream.
    """

    def __init__(self, early: float = 0.0, seed: int = 0) -> None:
        self.streams: list[Stream] = []
        self.done: Counter[Stream] = Counter()
        self.copies = Copies(self.broken)
        self.steps = Steps(lambda: self.done, self.broken)
        self.default = self.current = self._outer = Stream(self)
        self._early, self._random = early, random.Random(seed)
        self._moments: list[Counter[Stream]] = []  # recorded, and not over
        self._allocated: dict[int, tuple[Stream, int]] = {}
        self._time = 0
        self._is_broken = False

    @contextmanager
    def installed(self) -> Iterator[SlowDevice]:
        """Let torch's CUDA streams, events and pinned memory be this device's.

        When the block ends without an error everything is waited for, and what was not checked yet
        is.
        """
        made: dict[str, Callable[..., Any]] = {
            "Stream": partial(Stream, self),
            "Event": partial(Event, self),
            "stream": self.stream,
            "current_stream": lambda *_: self.current,
            "synchronize": lambda *_: self.synchronize(),
            "empty_cache": lambda: None,
        }
        with patch.multiple(torch.cuda, **made), _Tensors(self):
            yield self
        self.synchronize()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """As `torch.cuda.stream`; what its copies write is unseen until others are ordered so."""
        before = self._outer, self.current
        self._outer, self.current = self.current, stream
        try:
            yield
        finally:
            if self._apart:
                self.copies.hide(stream)
            self._outer, self.current = before

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """A copy that nobody waits for."""
        stream, outer = self.current, self._outer
        before = stream.after | self.done
        if self._apart and self.copies.is_pinned(source):
            user, since = self._allocated.get(target.untyped_storage().data_ptr(), (outer, 0))
            if before[user] < since and user is not self.default:
                self.broken("memory of one stream was written by another that did not wait for it")
            self.steps.staging(before, target.data_ptr(), target.nbytes)
        elif self._apart:
            size = source.shape[-1] * source.element_size()
            of_pages = self.steps.copying(
                stream, before, source.data_ptr(), target.data_ptr(), size
            )
            if not of_pages and before[outer] < outer.after[outer]:
                self.broken("a copy did not wait for the kernels before it")
        number = stream.enqueue()
        self.copies.enqueue(stream, number, target, source, apart=self._apart)
        return target

    @property
    def _apart(self) -> bool:
        """Whether the current stream was entered from another one, which goes on beside it."""
        return self._outer not in {self.default, self.current}

    def allocate(self, tensor: torch.Tensor) -> None:
        """A tensor has memory that kernels of the current stream may still use."""
        place = tensor.untyped_storage().data_ptr()
        self._allocated[place] = self.current, self.current.after[self.current]

    def synchronize(self) -> None:
        """As `torch.cuda.synchronize`."""
        for stream in self.streams:
            self.wait(stream.after)

    def wait(self, moment: Counter[Stream]) -> None:
        """Let everything before `moment` be over."""
        self.done |= moment
        self._moments = [m for m in self._moments if not m <= self.done]
        self.copies.over(self.done)

    def is_over(self, moment: Counter[Stream]) -> bool:
        """Whether everything before `moment` is over; asking may be what it was waiting for."""
        self._maybe_finish()
        return moment <= self.done

    def recorded(self, moment: Counter[Stream]) -> None:
        """An event was put at `moment`."""
        self._maybe_finish()
        self._moments.append(moment)

    def tick(self) -> int:
        """The next number of a clock that all streams share."""
        self._time += 1
        return self._time

    def broken(self, what: str) -> None:
        """Raise an error, unless one was raised already: it may have left anything behind."""
        if not self._is_broken:
            self._is_broken = True
            raise TooEarlyError(what)

    def _maybe_finish(self) -> None:
        if self._moments and self._random.random() < self._early:
            self.wait(self._random.choice(self._moments))


class _Tensors(TorchFunctionMode):
    """Counts what torch computes as kernels of the current stream, and takes copies over."""

    def __init__(self, device: SlowDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.copy_ and (kwargs.pop("non_blocking", False) or any(args[2:])):
            with aside():
                return self._device.copy(*args[:2])
        pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        self._device.current.enqueue()
        if pinned:
            self._device.copies.pin(result)
        elif func in {torch.empty, torch.empty_like}:
            self._device.allocate(result)
        return result
