"""A bounded queue between two threads that either side can close, with the reason."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Closed(Exception):  # noqa: N818 - how a consumer learns of the end, not a failure
    """No more items come, or nobody takes them any more."""


class Sender(Protocol[T_contra]):
    """The end of a channel where items go in."""

    @property
    def full(self) -> bool:
        """Whether the next `put` would wait."""

    def put(self, item: T_contra) -> None:
        """Hand an item on; raises `Closed`."""

    def close(self) -> None:
        """Say that no more items come."""


class Channel(Generic[T]):
    """Items in order, at most `size` of them waiting."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Add an item, waiting for room.

        Raises:
            Closed: The channel was closed, before or while waiting.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._size)
            if self._closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def take(self, most: int, timeout: float | None = 0) -> list[T]:
        """Take up to `most` items, waiting up to `timeout` seconds (None: for ever) for the first.

        Returns:
            An empty list on a timeout.

        Raises:
            Closed: The channel was closed and every item taken.
        """
        with self._changed:
            if timeout != 0:
                self._changed.wait_for(lambda: self._closed or self._items, timeout)
            if self._closed and not self._items:
                raise Closed
            taken = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            self._changed.notify_all()
            return taken

    def wait(self, seconds: float) -> None:
        """Return when something has changed, or after a timeout.

        Raises:
            Closed: The channel is closed.
        """
        with self._changed:
            if not self._closed:
                self._changed.wait(seconds)
            if self._closed:
                raise Closed

    @property
    def full(self) -> bool:
        """Whether `put` would wait, as long as nobody else puts or takes."""
        return len(self._items) >= self._size

    def close(self, *, discard: bool = False) -> None:
        """End it: no more `put`. Items inside can still be taken, unless they are discarded."""
        with self._changed:
            self._closed = True
            if discard:
                self._items.clear()
            self._changed.notify_all()
