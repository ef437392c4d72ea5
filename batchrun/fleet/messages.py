"""What a coordinator and its workers say to each other: values, which can be sent anywhere.

    coordinator                                   worker
        | -- Setup --------------------------------> |   loads the model
        | <------------------------------- Ready --- |
        | -- Work ---------------------------------> |   again and again, as it has room
        | <----------------------- Ended, Begun ---- |
        | -- Release ------------------------------> |   when others have nothing to do
        | <---------------------------- Returned --- |
        | -- Finish, or Stop ----------------------> |
        | <------------------------------ Closed --- |

A worker that can't go on says `Failed`. For one that says nothing any more, whoever started it says
`Lost`. Before that anything may have been sent, after it nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from batchrun.jobs.journal.results import Partial, Result
from batchrun.jobs.spec import JobSpec
from batchrun.runner.planner import Waiting

Key = tuple[int, int]  # row and sample
Figures = Mapping[str, Any]  # by the names of `batchrun.jobs.metrics`


class Setup(NamedTuple):
    """What a worker is to be.

    Attributes:
        spec: The job, its device the worker's, its model where the worker finds it.
        device: The device to compute on.
        name: What to call it to users, who may have several machines.
        cpus: The processors to run on; empty for all.
        node: The NUMA node that these belong to; None if they belong to several.
        threads: Threads to compute with; 0 for one on each processor.
        notes: A folder for notes that outlive the worker.
    """

    spec: JobSpec
    device: str
    name: str
    cpus: tuple[int, ...] = ()
    node: int | None = None
    threads: int = 0
    notes: str = ""


class Limits(NamedTuple):
    """What a worker's engine can do, as the reader and the coordinator need to know it."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """Rows to compute; `alone`, if they may crash the worker, with nothing else in the engine."""

    rows: tuple[Waiting, ...]
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Recall:
    """Answers of earlier runs, to draft from, and their constraint."""

    answers: tuple[tuple[int, ...], ...]
    constraint: str | None


@dataclass(frozen=True, slots=True)
class Release:
    """Give back up to so many rows that have not begun, or have far to go."""

    count: int


@dataclass(frozen=True, slots=True)
class Finish:
    """No more rows come: end when there is nothing left to compute."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End now: say what unfinished rows have so far."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    limits: Limits
    figures: Figures
    host: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    """A line that a user should see."""

    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Results of rows that have ended, and the worker's figures if they are due."""

    results: tuple[Result, ...]
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The tokens that the worker's unfinished rows have so far."""

    partials: tuple[Partial, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """Rows that the worker has let go of, continued where they are."""

    rows: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class Closed:
    """The worker has ended as it was told to."""

    figures: Figures


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker has ended with an error that none of its rows has caused."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker has ended without a word.

    Args:
        how: How, in a clause that continues "it".
        crashed: Whether a fault ended it, so that its rows may be to blame.
        suspects: The rows that were in its engine then.
        for_good: Whether another worker on that device would fare no better.
    """

    how: str
    crashed: bool = False
    suspects: tuple[int, ...] = field(default=())
    for_good: bool = False


ToWorker = Setup | Work | Recall | Release | Finish | Stop
FromWorker = Ready | Log | Ended | Begun | Returned | Closed | Failed | Lost
