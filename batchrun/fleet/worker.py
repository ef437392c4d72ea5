"""A worker: an engine in a process of its own, that computes the rows it is sent.

Two threads; what they share is a channel of rows and a few flags:

    receiver   takes the coordinator's messages
    main       steps the engine, sends what comes out
"""

from __future__ import annotations

import os
import platform
import threading
import time
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun.errors import UserError, sendable
from batchrun.fleet.cores import pin
from batchrun.fleet.messages import (
    Begun,
    Closed,
    Ended,
    Failed,
    Finish,
    FromWorker,
    Limits,
    Log,
    Ready,
    Recall,
    Release,
    Returned,
    Setup,
    Stop,
    ToWorker,
    Work,
)
from batchrun.jobs.inflight import InFlightRows
from batchrun.jobs.journal.results import Result
from batchrun.machine import use_cores
from batchrun.runner.channel import Channel
from batchrun.runner.channel import Closed as ChannelClosed
from batchrun.runner.engine_loop import EngineLoop
from batchrun.runner.figures import RunFigures
from batchrun.runner.opening import open_runtime
from batchrun.runner.planner import Waiting
from batchrun.runner.watchdog import Watchdog
from batchrun.runner.writer import Item

if TYPE_CHECKING:  # they import torch
    from batchrun.engine.build import Assembly
    from batchrun.engine.core import Request

_FLUSH_S = 0.02  # between two messages with results
_FIGURES_S = 0.25  # between two that have figures
_PATIENCE = 6  # loading the model may take this many times as long as a step


def work_for(connection: Connection, watchdog: Watchdog) -> None:
    """Be a worker until the coordinator says that it is enough, or is gone.

    Args:
        connection: To the coordinator; a `Setup` comes first.
        watchdog: Told what this does.
    """
    setup = connection.recv()
    assert isinstance(setup, Setup)
    pin(setup.cpus, setup.node)
    if setup.threads:
        os.environ["OMP_NUM_THREADS"] = str(setup.threads)
    worker = _Worker(setup, connection, watchdog)
    if (note := use_cores()) is not None:
        worker.send(Log(note))
    with closing(InFlightRows(Path(setup.notes))) as in_flight:
        in_flight.clear()  # left by an earlier worker
        try:
            worker.run(in_flight)
        except Exception as error:
            if not isinstance(error, UserError | OSError | MemoryError):
                raise
            worker.send(Failed(sendable(error)))


class _Worker:
    """One worker's state; it receives results as the end of a channel would (`put`)."""

    def __init__(self, setup: Setup, connection: Connection, watchdog: Watchdog) -> None:
        self._setup, self._connection, self._watchdog = setup, connection, watchdog
        self._requests: Channel[Request] = Channel(1 << 40)  # the coordinator bounds them
        self._suspects = set[int]()
        self._stop = threading.Event()
        self._release: list[int] = []
        self._results: list[Result] = []
        self._flushed = self._told = 0.0
        self._figures = RunFigures()
        self._bench: Assembly | None = None
        self._loop: EngineLoop | None = None

    def send(self, message: FromWorker) -> None:
        """Tell the coordinator something; a coordinator that is gone is not told."""
        with suppress(OSError):
            self._connection.send(message)

    def run(self, in_flight: InFlightRows) -> None:
        """Load the model, then compute until there is nothing more to do."""
        spec = self._setup.spec
        with self._watchdog.busy("loading the model", _PATIENCE):
            bench = open_runtime(spec, lambda text: self.send(Log(text)))
        with bench:
            figures = self._figures
            figures.workbench, self._bench = bench, bench
            figures.counted["load_s"] = time.perf_counter() - figures.began
            limits = Limits(
                bench.loaded.max_model_len, bench.max_num_seqs, bench.max_num_batched_tokens
            )
            self.send(Ready(limits, figures.so_far(), platform.node()))
            loop = self._loop = EngineLoop(
                *(bench.engine, lambda request, result: (), in_flight, self._suspects, figures),
                *(self._watchdog, self._stop.is_set, self._stepped),
            )
            threading.Thread(target=self._receive, name="receiver", daemon=True).start()
            figures.engine_began = time.perf_counter()
            loop.run(self._requests, self)
            figures.engine_ended = time.perf_counter()
            self._flush()
            self.send(Closed(figures.so_far()))

    @property
    def full(self) -> bool:
        """Whether `put` would wait: it never does."""
        return False

    def put(self, item: Item) -> None:
        """Take a result, or the tokens of unfinished rows, from the engine's loop."""
        if isinstance(item, Result):
            self._results.append(item)
        elif isinstance(item, list):
            self.send(Begun(tuple(item)))

    def close(self) -> None:
        """Do nothing: the loop's end is the worker's."""

    def _stepped(self) -> None:
        """Send what is due, and let go of rows if asked to; called after each step."""
        assert self._bench is not None
        assert self._loop is not None
        if time.monotonic() >= self._flushed + _FLUSH_S or not self._bench.engine.has_work:
            self._flush()
        while self._release:
            released = self._loop.release(self._release.pop())
            self._flush()  # what ended meanwhile
            self.send(Returned(tuple(map(Waiting.of, released))))

    def _flush(self) -> None:
        now = time.monotonic()
        due = now >= self._told + _FIGURES_S
        if self._results or due:
            figures: dict[str, Any] | None = self._figures.so_far() if due else None
            self._told = now if due else self._told
            self.send(Ended(tuple(self._results), figures))
            self._results, self._flushed = [], now

    def _receive(self) -> None:
        """Take messages until the coordinator is gone: then nobody is there to work for."""
        while True:
            try:
                self._take(self._connection.recv())
            except (EOFError, OSError):
                os._exit(0)

    def _take(self, message: ToWorker) -> None:
        with suppress(ChannelClosed):
            if isinstance(message, Work):
                if message.alone:
                    self._suspects.update(row.rest.row for row in message.rows)
                for row in message.rows:
                    self._requests.put(row.request())
            elif isinstance(message, Release):
                self._release.append(message.count)
            elif isinstance(message, Finish):
                self._requests.close()
            elif isinstance(message, Stop):
                self._stop.set()
            elif isinstance(message, Recall) and self._bench is not None:
                self._bench.recall(message.answers, message.constraint)
