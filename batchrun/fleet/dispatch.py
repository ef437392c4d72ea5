"""Which worker computes which row. Pure decisions: no process, no clock.

Each row that is in here is at any moment in exactly one place:

    put -> group -> outstanding at a worker -> ended
             ^                |
             +-- returned, or given back by a worker that is lost
             +-> suspects -> outstanding alone, at one worker

Workers pull: each gets more as it has room, so that none is left idle while there are rows. Rows
that begin alike make a group, and a group goes to one worker for as long as the others have groups
of their own: that worker then computes the common beginning once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from batchrun.engine.prefixes import BLOCK
from batchrun.fleet.messages import Key, Limits, Work
from batchrun.jobs.journal.results import Partial
from batchrun.runner.planner import WIDTH, Waiting
from batchrun.runner.reader import CRASHES

_GROUP = 64  # rows of a group, at most
_AHEAD = 2  # the part of a worker's sequences that wait in it: one in so many
_LEAST_AHEAD = 8
_BUFFERED = 128  # rows for each worker that wait here

_Group = deque[Waiting]


@dataclass(eq=False)
class _Worker:
    limits: Limits
    outstanding: dict[Key, Waiting] = field(default_factory=dict)
    group: _Group = field(default_factory=deque)  # what it is to get next
    alone: bool = False  # its row is a suspect
    waiting: int = 0  # rows that it has not begun, by its own last word
    asked: bool = False  # to release rows

    @property
    def room(self) -> int:
        """Rows that it can still take."""
        ahead = max(_LEAST_AHEAD, self.limits.max_num_seqs // _AHEAD)
        return self.limits.max_num_seqs + ahead - len(self.outstanding)

    @property
    def free(self) -> int:
        """Rows that it could begin at once."""
        return self.limits.max_num_seqs - len(self.outstanding)


class Loss(NamedTuple):
    """What became of a lost worker's rows.

    Attributes:
        crashed: Numbers of the rows that may have crashed it.
        ended: The rows that were in a crash too often. They don't go back: they have ended.
    """

    crashed: tuple[int, ...]
    ended: tuple[Waiting, ...]


class Dispatch:
    """The rows that were read and have not ended, and the workers that may compute them.

    Args:
        crashes: How often a run has crashed with a row in it, by row.

    Attributes:
        crashes: The same, and how often a worker has.
        is_complete: Whether all rows have been put; set by the caller.
        num_coming: Workers that are about to join; set by the caller.
        num_outstanding: Rows that are at a worker.
    """

    def __init__(self, crashes: Mapping[int, int]) -> None:
        self.crashes = dict(crashes)
        self.is_complete = False
        self.num_outstanding = self.num_coming = 0
        self._workers: dict[int, _Worker] = {}
        self._free: deque[_Group] = deque()  # groups that no worker has begun
        self._last: tuple[_Group, Waiting] | None = None  # where the last row was put
        self._num_waiting = 0  # rows in groups
        self._suspects: deque[Waiting] = deque()
        self._alone: int | None = None  # the worker that computes them
        self._begun: dict[Key, Partial] = {}  # tokens of outstanding rows

    @property
    def wanting(self) -> int:
        """How many more rows should be put, so that no worker has to wait for them."""
        most = sum(_BUFFERED + max(0, worker.room) for worker in self._workers.values())
        return max(0, most - self._num_waiting)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to do, unless more is put."""
        return not (self._num_waiting or self._suspects or self.num_outstanding)

    def is_idle(self, worker: int) -> bool:
        """Whether a worker has no rows."""
        return not self._workers[worker].outstanding

    def join(self, worker: int, limits: Limits) -> None:
        """Add a worker that is ready for rows."""
        assert worker not in self._workers
        self._workers[worker] = _Worker(limits)

    def put(self, row: Waiting) -> None:
        """Add a row, in planned order."""
        if row.rest.row in self.crashes:
            self._suspects.append(row)
            return
        group = None
        if self._last is not None and _alike(self._last[1], row):
            group = self._last[0] if len(self._last[0]) < _GROUP else None
        if group is None:
            self._free.append(group := deque())
        group.append(row)
        self._last = group, row
        self._num_waiting += 1

    def take(self, worker: int) -> Work | None:
        """What to send to a worker now; it is then outstanding there."""
        state = self._workers[worker]
        if self._suspects and self._computes_suspects(worker):
            if state.outstanding:
                return None  # it would not be alone yet
            found = [self._suspects.popleft()]
        else:
            found = [] if state.alone else list(self._next_rows(state, self._room(state)))
        if not found:
            return None
        state.alone = found[0].rest.row in self.crashes
        state.outstanding.update((_key(row), row) for row in found)
        self.num_outstanding += len(found)
        return Work(tuple(found), state.alone)

    def end(self, worker: int, key: Key) -> Waiting | None:
        """Note that a row has ended; None if it is not that worker's (any more)."""
        state = self._workers.get(worker)
        row = state.outstanding.pop(key, None) if state is not None else None
        if state is None or row is None:
            return None
        self.num_outstanding -= 1
        self._begun.pop(key, None)
        state.alone = state.alone and bool(state.outstanding)
        return row

    def note_begun(self, worker: int, partials: Iterable[Partial]) -> None:
        """Note the tokens that a worker's rows have so far, from which they continue if it dies."""
        state = self._workers.get(worker)
        for partial in partials:
            if state is not None and (partial.row, partial.sample) in state.outstanding:
                self._begun[partial.row, partial.sample] = partial

    def note_waiting(self, worker: int, waiting: int) -> None:
        """Note how many rows a worker has not begun yet."""
        if worker in self._workers:
            self._workers[worker].waiting = waiting

    def take_back(self, worker: int, rows: Iterable[Waiting]) -> None:
        """Take in the rows that a worker returns after it was asked to."""
        state = self._workers.get(worker)
        if state is None:
            return
        state.asked = False
        back = [row for row in rows if state.outstanding.pop(_key(row), None) is not None]
        self.num_outstanding -= len(back)
        for row in back:
            self._begun.pop(_key(row), None)
        self._give_back(back)

    def lose(self, worker: int, suspects: Iterable[int] = ()) -> Loss:
        """Take a worker out; its rows go back.

        Args:
            worker: The worker, which has ended.
            suspects: Rows that may have crashed it: they are computed alone from now on.

        """
        state = self._workers.pop(worker, None)
        if state is None:
            return Loss((), ())
        self._alone = None if self._alone == worker else self._alone
        self.num_outstanding -= len(state.outstanding)
        if state.group:
            self._free.appendleft(state.group)
        else:
            self._leave(state.group)
        crashed = {row for row, _ in state.outstanding}.intersection(suspects)
        for row in crashed:
            self.crashes[row] = self.crashes.get(row, 0) + 1
        rows = [self._continued(row) for row in state.outstanding.values()]
        self._give_back(rows)
        over = [r for r in self._suspects if self.crashes[r.rest.row] >= CRASHES]
        self._suspects = deque(r for r in self._suspects if self.crashes[r.rest.row] < CRASHES)
        return Loss(tuple(sorted(crashed)), tuple(over))

    def releases(self) -> Iterator[tuple[int, int]]:
        """Workers to ask for rows that others would compute sooner, and for how many.

        Only when there is nothing else to give: a worker that has at most half of another's rows,
        or could begin those that wait there, gets a part of them.
        """
        states, busy = self._workers, self._alone if self._suspects else None
        plain = [w for w, s in states.items() if not s.alone and w != busy]
        if not self.is_complete or self._num_waiting or len(plain) < 2:
            return
        if any(states[w].asked for w in plain):
            return  # who gets what is seen when it comes
        plain.sort(key=lambda w: len(states[w].outstanding))
        while len(plain) > 1:
            taker, giver = states[plain.pop(0)], states[plain[-1]]
            mine, theirs = len(taker.outstanding), len(giver.outstanding)
            count = min((theirs - mine) // 2, taker.free)
            if count < 1 or not (2 * mine <= theirs or giver.waiting):
                return
            giver.asked = True
            yield plain.pop(), count

    def progress(self) -> list[tuple[int, int]]:
        """For each row known to be begun at a worker, the tokens that it has and may have."""
        begun = self._begun
        return [
            (len(begun[key].token_ids), row.rest.params.max_tokens)
            for state in self._workers.values()
            for key, row in state.outstanding.items()
            if key in begun
        ]

    def partials(self) -> list[Partial]:
        """The last known tokens of all rows that are at a worker."""
        return list(self._begun.values())

    def _computes_suspects(self, worker: int) -> bool:
        """Whether suspects are that worker's: one worker's at a time, best of all an empty one."""
        states = self._workers
        if self._alone not in states:
            self._alone = min(states, key=lambda w: len(states[w].outstanding))
        elif not states[worker].outstanding and not states[self._alone].alone:
            self._alone = worker
        return self._alone == worker

    def _room(self, state: _Worker) -> int:
        """Rows that a worker may get now: when the last ones are given, each gets its share."""
        if not self.is_complete:
            return state.room
        left = self._num_waiting + self.num_outstanding
        share = -(-left // (len(self._workers) + self.num_coming))
        return min(state.room, share - len(state.outstanding))

    def _next_rows(self, state: _Worker, room: int) -> Iterator[Waiting]:
        """Rows of the worker's own group, then of a new one, then of another worker's."""
        while room > 0 and self._num_waiting:
            if not state.group:
                self._leave(state.group)
                state.group = self._free.popleft() if self._free else self._half_of_another()
            room -= 1
            self._num_waiting -= 1
            yield state.group.popleft()

    def _leave(self, group: _Group) -> None:
        """Note that nothing can be added to a group any more."""
        if self._last is not None and self._last[0] is group:
            self._last = None

    def _half_of_another(self) -> _Group:
        """The later half of the largest group that a worker has begun, or all of a single row."""
        largest = max((worker.group for worker in self._workers.values()), key=len)
        taken = [largest.pop() for _ in range((len(largest) + 1) // 2)]
        half = deque(reversed(taken))
        if self._last is not None and self._last[0] is largest:
            self._last = half, self._last[1]
        return half

    def _give_back(self, rows: Iterable[Waiting]) -> None:
        """Rows that were given out go before all others, so that few are open at any time."""
        again: _Group = deque()
        for row in rows:
            (self._suspects if row.rest.row in self.crashes else again).append(row)
        if again:
            self._num_waiting += len(again)
            self._free.appendleft(again)

    def _continued(self, row: Waiting) -> Waiting:
        """The row from where its worker last said that it was."""
        known, rest = self._begun.pop(_key(row), None), row.rest
        if known is None or len(known.token_ids) < len(rest.generated_ids):
            return row
        begun = replace(
            rest,
            generated_ids=tuple(known.token_ids),
            generated_logprob=known.logprob or 0.0,
            generated_logprobs=tuple(known.logprobs or ()),
        )
        return row._replace(rest=begun)


def _key(row: Waiting) -> Key:
    return row.rest.row, row.rest.sample


def _alike(one: Waiting, other: Waiting) -> bool:
    """Whether a row shares half of its prompt, and enough of it, with the one before it."""
    half = max(BLOCK, len(other.prompt) // WIDTH // 2) * WIDTH
    if len(other.prompt) < half or one.rest.context != other.rest.context:
        return False
    return one.prompt[:half] == other.prompt[:half]
