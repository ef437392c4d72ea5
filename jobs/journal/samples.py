"""Figures over time: as a run writes its results, it keeps a sample of its figures now and then.

A sample costs no transaction of its own. They are `_EVERY_S` apart until there are `MOST`; then
every other one is dropped and the interval doubles, so that a run of days keeps as many as a run
of an hour.
"""

from __future__ import annotations

import json
import math
import sqlite3

from batchrun.jobs.metrics import SAMPLED, Figures

MOST = 2000  # samples of a run
_EVERY_S = 2.0
_INSERT = (
    "INSERT INTO samples SELECT id, ?1, ?2, checksum(id, ?1, ?2) "
    "FROM (SELECT ifnull(max(id), 0) + 1 AS id FROM samples)"
)
_THIN = (
    "DELETE FROM samples WHERE id IN (SELECT id FROM "
    "(SELECT id, row_number() OVER (ORDER BY id) AS place FROM samples WHERE run = ?) "
    "WHERE place % 2 = 0)"
)


class Samples:
    """Keeps samples of one run's figures."""

    def __init__(self) -> None:
        self._every_s = _EVERY_S
        self._last_s = -math.inf
        self._count = 0

    def add(self, db: sqlite3.Connection, run: int, figures: Figures) -> int:
        """Keep a sample if one is due, as part of the current transaction.

        Returns:
            The bytes that it takes.
        """
        now = figures.get("wall_s", 0.0)
        if now - self._last_s < self._every_s:
            return 0
        sample = json.dumps({name: figures[name] for name in SAMPLED if name in figures})
        db.execute(_INSERT, (run, sample))
        self._last_s = now
        self._count += 1
        if self._count > MOST:
            self._count -= db.execute(_THIN, (run,)).rowcount
            self._every_s *= 2
        return len(sample)
