"""An executor without a model whose tokens prove that memory, order and resume are right.

It writes each token id into the slot and computes the next token from what it reads back from the
slot: a page that is shared by mistake, lost, or stale changes the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import pairwise

import torch

from batchrun.allocator.sharing import MemoryCopy
from batchrun.engine.attention.batch import SharedParts, shared_parts
from batchrun.engine.beams import BeamGroup, width
from batchrun.engine.core import Candidates, Request, Segment, Sequence
from batchrun.engine.executor import Ticket
from batchrun.engine.plan import Masks, StepOutput, StepPlan
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.lookup import Lookup

VOCAB = 997
PART = 4  # tokens whose attention is a sum of its own


def next_token(ids: Seq[int]) -> int:
    """The token that follows `ids`: each of them and its position matter."""
    total = 17
    for position, token in enumerate(ids, 1):
        total = (total + position * (token + 1)) % 1_000_003
    return total % VOCAB


def score_of(ids: Seq[int], token: int) -> float:
    """The score of a token after `ids`: a number of its own, exact in any float."""
    return -float((next_token(ids) * 1009 + token) % 65_521)


def expected(prompt: Seq[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def candidates(ids: Seq[int], count: int) -> Candidates:
    """What may follow `ids`, the likeliest first: no two answers score alike, but by chance."""
    first = next_token(ids)
    tokens = [(first + 31 * i * i) % VOCAB for i in range(count)]
    scores = ((t, -0.3 - i * (1 + first % 7) / 5) for i, t in enumerate(dict.fromkeys(tokens)))
    return tuple((token, score, score) for token, score in scores)


def expected_of_beams(request: Request, max_tokens: int, stops: frozenset[int]) -> list[int]:
    """The best answer, by a search without an engine."""
    leader = Sequence(request)
    group = BeamGroup(leader, max_tokens, stops)
    while not group.ended:
        for sequence in group.sequences:
            group.report(sequence, candidates(sequence.known_ids, _count(request, stops)))
        group.advance()
    group.finish()
    return leader.output_ids


def _count(request: Request, stops: frozenset[int]) -> int:
    return width(request.params.num_beams, len(stops))


class Oracle(Lookup):
    """Guesses what comes, but for one token in five."""

    def find(self, most: int) -> list[int]:
        super().find(most)
        ids = list(self._sequence.known_ids)
        for _ in range(most):
            ids.append(next_token(ids))
        came = ids[len(ids) - most :]
        return [token if token % 5 else token + 1 for token in came]


class Costs(StepCost):
    """A step of a second, to which a draft token adds so many seconds, whatever is measured."""

    def __init__(self, free: int = 16, draft: float = 0.01) -> None:
        super().__init__(free)
        self.draft = draft

    def of(self, rows: int, others: int = 0) -> tuple[float, float]:
        return 1.0, self.draft


class EchoExecutor:
    """Keys `[slots, tokens, 1, dim]` of float64 hold the token ids, in every element.

    With a lag, launched steps are run as late as a slow device could: when they are collected. A
    page that is taken away, or a token that is asked for, before its time shows.
    """

    on_host = False

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slab: torch.Tensor,
        lag: int = 0,
        stops: frozenset[int] = frozenset(),
    ) -> None:
        self.keys, self.values, self.slab, self.lag = keys, values, slab, lag
        self._queue = deque[tuple[StepPlan, list[Request], Seq[MemoryCopy], SharedParts | None]]()
        self.num_shared_parts = 0  # of decodes, as often as another's could be read instead
        self._requests: dict[int, Request] = {}  # slot -> whose
        self._last: dict[int, int] = {}
        self._stops = stops
        self._collected = 0

    def seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def launch(self, plan: StepPlan) -> Ticket:
        for s in plan.segments:
            is_pending = s.length == 1 and not s.token_ids
            assert is_pending or len(s.token_ids) == s.length, "a token is planned but not known"
        self._requests |= {new.slot: new.request for new in plan.new}
        requests = [self._requests[s.slot] for s in plan.segments]  # by now, not when it is run
        copies = plan.copies
        if plan.copies_after <= self._collected:  # as early as may be: others are still to run
            self._copy(copies)
            copies = ()
        self._queue.append((plan, requests, copies, shared_parts(plan.segments, PART)))
        assert len(self._queue) <= self.lag + 1
        return Ticket(plan.step)

    def sample(self, ticket: Ticket, masks: Masks | None = None) -> None:
        assert self._queue[-1][0].step == ticket.step, "another step was launched before"

    def collect(self, ticket: Ticket) -> StepOutput:
        plan, requests, copies, shared = self._queue.popleft()
        assert plan.step == ticket.step, "steps are collected out of order"
        self._copy(copies)
        self._collected = plan.step
        read = list(self._run(plan, requests, shared))
        scores = [score for s in plan.segments if s.targets for score in self._scores(s)]
        of_beams = tuple(
            candidates(ids, _count(request, self._stops)) if request.params.beams else ()
            for request, ids in read
        )
        return StepOutput(
            plan.step,
            tuple(next_token(ids) for _, ids in read),
            (),
            of_beams if any(of_beams) else (),
            scores=tuple(scores),
        )

    def busy(self) -> bool:
        return bool(self._queue)

    def _copy(self, copies: Seq[MemoryCopy]) -> None:
        for c in copies:
            source = self.slab[:, c.source : c.source + c.nbytes]
            self.slab[:, c.target : c.target + c.nbytes] = source

    def _run(
        self, plan: StepPlan, requests: list[Request], shared: SharedParts | None
    ) -> Iterator[tuple[Request, list[int]]]:
        if shared is not None:
            self._compare(plan.segments, shared)
        for s in plan.segments:
            known = s.token_ids or [self._last[s.slot]]
            ids = torch.tensor(known, dtype=torch.float64)
            self.keys[s.slot, s.start : s.start + s.length] = ids[:, None, None]
            self.values[s.slot, s.start : s.start + s.length] = -ids[:, None, None]
        for s, request in zip(plan.segments, requests, strict=True):
            if s.sampled:
                ids = self._read(s)
                if s.num_drafts:  # which is the last is for the host to say
                    self._last.pop(s.slot, None)
                else:
                    self._last[s.slot] = next_token(ids)
                for end in range(len(ids) - s.num_drafts, len(ids) + 1):
                    yield request, ids[:end]

    def _scores(self, segment: Segment) -> Iterator[float]:
        assert not segment.sampled
        assert len(segment.targets) <= segment.length
        ids = self._read(segment)
        for end, wanted in enumerate(segment.targets, len(ids) - len(segment.targets) + 1):
            for token in wanted:
                yield score_of(ids[:end], token)

    def _compare(self, segments: Seq[Segment], shared: SharedParts) -> None:
        """What attention may read in any one member's slot is the same in all."""
        for part, (begin, end) in zip(shared.part, pairwise(shared.starts), strict=True):
            tokens = slice(part * PART, (part + 1) * PART)
            members = [segments[i] for i in shared.members[begin:end]]
            assert len(members) > 1
            for s in members:
                assert s.length == 1
                assert tokens.stop <= s.start
                assert torch.equal(self.keys[s.slot, tokens], self.keys[members[0].slot, tokens])
            self.num_shared_parts += len(members) - 1
        of_each = [set[int]() for _ in segments]
        for part, (begin, end) in zip(shared.part, pairwise(shared.starts), strict=True):
            for i in shared.members[begin:end]:
                of_each[i].add(int(part))
        assert of_each == [set(range(own)) for own in shared.own]

    def _read(self, segment: Segment) -> list[int]:
        end = segment.start + segment.length
        keys, values = self.keys[segment.slot, :end], self.values[segment.slot, :end]
        assert torch.equal(keys, -values), "keys and values of a token disagree"
        assert torch.equal(keys, keys[:, :, :1].expand_as(keys)), "a token's elements disagree"
        return keys[:, 0, 0].long().tolist()
