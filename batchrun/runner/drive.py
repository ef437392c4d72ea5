"""Drives an engine with a reader's rows in one thread, without a journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from batchrun.engine.core import Request
from batchrun.jobs.journal.results import CopiedResult, Result, RowDigests
from batchrun.runner.engine_loop import result_of
from batchrun.runner.reader import QUEUED_REQUESTS, Reader

if TYPE_CHECKING:  # imports torch
    from batchrun.engine.engine import Engine


class Drive:
    """Takes the reader's requests and results, and steps the engine.

    Args:
        engine: The engine.
        reader: Told when a row ends.
        alone: Compute one request after the other, never two together.
        ended: Called with each result.

    Attributes:
        results: By row and sample.
    """

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        *,
        alone: bool = False,
        ended: Callable[[Result], None] = lambda _: None,
    ) -> None:
        self._engine, self._reader, self._alone, self._ended = engine, reader, alone, ended
        self.results: dict[tuple[int, int], Result] = {}

    @property
    def full(self) -> bool:
        """Whether enough is in the engine."""
        return self._engine.has_work if self._alone else self._engine.load()[1] >= QUEUED_REQUESTS

    def put(self, item: Request | Result | CopiedResult | RowDigests) -> None:
        """Take a request to compute, or a result instead of it."""
        if isinstance(item, Request):
            while self.full:
                self.step()
            self._engine.add(item)
        elif isinstance(item, Result):
            self.results[item.row, item.sample] = item
            self._ended(item)
        elif isinstance(item, CopiedResult):
            of = self.results[item.of_row, item.of_sample]
            self.put(of._replace(row=item.row, sample=item.sample))

    def close(self) -> None:
        """Compute what is left; no more items come."""
        while self._engine.has_work:
            self.step()

    def step(self) -> None:
        """Run one step of the engine."""
        for completion in self._engine.step():
            request, result = completion.request, result_of(completion)
            self.put(result)
            for same in self._reader.ended(request, result):
                self.put(same)
