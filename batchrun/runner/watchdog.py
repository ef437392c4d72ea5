"""Notices when a thread is stuck in something that will not end by itself."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from batchrun import machine

_LOOKS = 20  # within the time after which something counts as hanging


@dataclass
class _Busy:
    """What a thread does, since when, since when it has not got on, and how long it may not."""

    what: str
    since: float
    still: float
    limit_s: float
    moving: Callable[[], object]
    at: object

    def stands(self, now: float) -> bool:
        """Whether it has not got on for too long."""
        if (at := self.moving()) != self.at:
            self.at, self.still = at, now
        return now - self.still > self.limit_s


class Watchdog:
    """Watches what threads say they are doing; inert until started.

    Time in which the process was stopped, or got no processor, does not count.

    Args:
        limit_s: Seconds that one thing may take.
        on_stall: Called once, in the watchdog's thread, with what takes longer and its seconds.
            It must end the process: no thread can be interrupted from outside.
    """

    def __init__(
        self, limit_s: float = float("inf"), on_stall: Callable[[str, float], None] | None = None
    ) -> None:
        self._limit_s = limit_s
        self._on_stall = on_stall
        self._busy: dict[int, _Busy] = {}
        self._lost = 0.0  # seconds in which nothing could be done

    @contextmanager
    def busy(
        self, what: str, patience: float = 1, moving: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Say that the calling thread is busy.

        Args:
            what: With what.
            patience: For up to so many times the limit.
            moving: What changes while it gets on; then it may go on for as long again.
        """
        thread, now = threading.get_ident(), time.monotonic() - self._lost
        self._busy[thread] = _Busy(what, now, now, patience * self._limit_s, moving, moving())
        try:
            yield
        finally:
            del self._busy[thread]

    def start(self) -> None:
        """Start watching, for as long as the process lives.

        Raises:
            MachineError: No thread can be started.
        """
        machine.start(threading.Thread(target=self._watch, name="watchdog", daemon=True))

    def _watch(self) -> None:
        look, before = self._limit_s / _LOOKS, time.monotonic()
        while True:
            # If a thread hangs in C while it holds the GIL, this one can't look any more, but
            # faulthandler's timer needs no lock. It prints where each thread is, and exits.
            faulthandler.dump_traceback_later(2 * self._limit_s, exit=True)
            time.sleep(look)
            now = time.monotonic()
            if now - before > 2 * look:
                self._lost += now - before - look
            before = now
            for busy in list(self._busy.values()):
                if busy.stands(now - self._lost) and self._on_stall is not None:
                    self._on_stall(busy.what, now - self._lost - busy.since)
                    return
