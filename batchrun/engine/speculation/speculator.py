"""Decides which draft tokens a step computes: those that will probably save more than they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from batchrun.engine.constraints import Constraints
from batchrun.engine.core import Segment, Sequence
from batchrun.engine.speculation.chances import Chances
from batchrun.engine.speculation.choice import Guess, Prices, worthwhile
from batchrun.engine.speculation.cost import StepCost
from batchrun.engine.speculation.lookup import LONGEST, Lookup
from batchrun.engine.speculation.modelguesses import ModelGuesses
from batchrun.engine.speculation.proposers import DraftBatch, DraftModel, num_right
from batchrun.engine.speculation.rest import Rest
from batchrun.engine.speculation.table import LONGEST_CONTEXT, AnswerTable

_LEAST_GAIN = 0.03  # of the time of steps: guessing that promises less may as well lose some
_WAKES = 0.1  # while it rests: how much likelier than would pay tokens must be, on average
_REPEATED = 16  # tokens in a row that a row's own text has: what repeats it is not learned
_LESS = 4  # while guessing rests, one row in so many is learned
_LEARNED = 5000.0  # tokens learned in a second, which takes a twentieth of it: the others are not
# Of a row's guesses, the share of right ones above which it sits out steps to verify some, if it
# did not and if it did: to begin takes one step more than to go on.
_BEGIN, _GO_ON = 0.7, 0.5
_KEPT = 7 / 8  # of that share, when another token is tested
_WATCHED = 8  # rows of a step whose guesses are only tested, as each takes some microseconds
_FORCED = "forced"  # kind of the tokens that a constraint forces
_SHARE = 4  # draft tokens that a row needs: fewer would not make up for a step
_MARGIN = 1.1  # times its cost that a draft token must be worth: costs and chances are estimates
_HOPES = 500.0  # about so many tokens tell how much too high the chances of those taken were
_LONGEST_STREAK = 127  # text in a loop goes on in it all the more surely


@dataclass(slots=True)
class _Row:
    """What is known of a sequence in a slot.

    `own` and `streak` count how many tokens in a row were right lately: of the guesses from its own
    text, and of all guesses. `rate` is the share of right ones among the last; where nothing was
    found, one was wrong. `learned` counts its tokens in the table.
    """

    lookup: Lookup
    namespace: int
    learned: int
    rate: float
    own: int = 0
    streak: int = 0
    known: int = 0  # tokens known when `guess` was made
    value: float = 0.0  # seconds that a token took then in a step without draft tokens
    guess: Guess | None = None


class Speculator:
    """Proposes what the row's own text, the other rows' answers and its constraint suggest.

    How many tokens pay follows from what a step was measured to cost, and from how often tokens of
    the same kind were right.

    Args:
        num_logits: Maximum rows of logits in a step, with drafts; each row is a whole vocabulary.
        cost: What steps cost.
        constraints: Knows which tokens constrained rows allow.
        table: What the job's answers have in common; None to use each row's own text alone.
        lookup: Makes the lookup in a sequence's own text.
        model: Chooses draft tokens where that pays.
        num_tokens: Maximum number of them for a row; None for as many as pay.
        overlap: Whether a step is planned before the tokens of the last one are known.
        rate: How often guesses are assumed to be right before any was tested.
    """

    def __init__(
        self,
        num_logits: int,
        cost: StepCost,
        constraints: Constraints | None = None,
        table: AnswerTable | None = None,
        lookup: Callable[[Sequence], Lookup] = Lookup,
        *,
        model: DraftModel | None = None,
        num_tokens: int | None = None,
        overlap: bool = False,
        rate: float = 0.0,
    ) -> None:
        self.num_logits = num_logits
        self._saved_s = 0.0  # what accepted tokens would have cost in steps of their own, estimated
        self._guessed_at, self._right_at = list[int](), list[int]()
        self.cost, self.constraints = cost, constraints
        self._table = table
        self._make, self._overlap, self._rate = lookup, overlap, rate
        self._chances = Chances()
        most = LONGEST if num_tokens is None else num_tokens
        self._model = ModelGuesses(model, self._chances, most) if model is not None else None
        self._rows: dict[Sequence, _Row] = {}
        self._may_learn = _LEARNED
        self._hoped = self._came = 10.0  # draft tokens: likely to come, and those that did
        self._paying = set[Sequence]()  # rows worth waiting for
        self._seconds = 0.0  # of all steps
        self._rest = Rest()
        self._room = 0  # for draft tokens in the last step
        self._turn = 0

    def open(self, sequence: Sequence) -> None:
        """See `Proposer.open`."""
        request = sequence.request
        namespace = _namespace(request.context, request.params.constraint)
        known = sequence.num_known_tokens
        self._rows[sequence] = _Row(self._make(sequence), namespace, known, self._rate)
        if self._model is not None:
            self._model.model.open(sequence)

    def close(self, sequence: Sequence) -> None:
        """See `Proposer.close`."""
        self._learn(sequence, self._rows.pop(sequence))
        self._paying.discard(sequence)
        if self._model is not None:
            self._model.model.close(sequence)

    def learn(self, context: tuple[str, ...], constraint: str | None, token_ids: Seq[int]) -> None:
        """See `Proposer.learn`."""
        if self._table is not None:
            self._table.learn(_namespace(context, constraint), token_ids, 0)

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """See `Proposer.settle`."""
        settled = [(sequence, self._rows[sequence]) for sequence in sequences]
        for sequence, row in settled:
            if row.guess is not None and sequence.num_known_tokens > row.known:
                self._judge(sequence, row, row.guess)
                row.guess = None
            self._learn(sequence, row)
        if self._model is not None:
            self._model.model.settle(sequence for sequence, _ in settled)
        if self._overlap:
            self._choose(settled)

    def _choose(self, settled: Seq[tuple[Sequence, _Row]]) -> None:
        """Decide for which rows draft tokens are worth the steps that they sit out."""
        paying = self._paying
        for sequence, row in settled:
            before = sequence in paying
            paying.discard(sequence)
            pays = row.rate > (_GO_ON if before else _BEGIN)
            if pays and _SHARE * (len(paying) + 1) <= self._room:
                paying.add(sequence)

    def pays(self, sequence: Sequence) -> bool:
        """See `Proposer.pays`."""
        return sequence in self._paying

    def observe(self, segments: Seq[Segment], seconds: float) -> None:
        """See `Proposer.observe`."""
        self.cost.observe(segments, seconds)
        self._seconds += seconds
        self._may_learn = min(self._may_learn + _LEARNED * seconds, _LEARNED)

    def measurements(self) -> dict[str, Any]:
        """See `Proposer.measurements`."""
        return {
            "guessed_at": list(self._guessed_at),
            "right_at": list(self._right_at),
            "drafts_saved_s": self._saved_s,
            "drafts_bytes": self._table.nbytes if self._table else 0,
        }

    def propose(self, batch: DraftBatch) -> list[tuple[int, ...]]:
        """See `Proposer.propose`."""
        rows, began = max(1, batch.num_logits), time.perf_counter()
        free = max(0, self.cost.free - batch.num_tokens)
        self._room = max(0, min(batch.budget, self.num_logits - batch.num_logits))
        # The likeliest of many guesses are less likely than they look.
        margin = _MARGIN * max(1.0, self._hoped / self._came)
        prices = Prices(*self.cost.of(rows), free, self._room, rows, margin)
        # With overlap, the device computes meanwhile, and rows have sat out steps for guesses.
        gained = self._saved_s - _LEAST_GAIN * self._seconds
        if batch.sequences and not self._overlap and self._rest.rests(rows, gained):
            some = self._watch([sequence for sequence, _ in batch.sequences], prices.least)
            if sum(max(0.0, each.expected - prices.least) for each in some) > _WAKES * len(some):
                self._rest.wake()
            return [()] * len(batch.sequences)
        asked = []
        for sequence, room in batch.sequences:
            row = self._rows[sequence]
            row.known, row.value = sequence.num_known_tokens, prices.step / rows
            row.guess = self._guess(sequence, row, room, prices.least)
            asked.append((sequence, room, row.guess))
        if self._model is not None:
            paused = time.perf_counter()
            self._saved_s -= self._model.improve(asked, prices)
            began += time.perf_counter() - paused
        guesses = [guess for _, _, guess in asked]
        taken, _ = worthwhile(guesses, prices)
        for count, guess in zip(taken, guesses, strict=True):
            guess.taken = count
        self._saved_s -= prices.spent(sum(taken))
        self._watch(batch.watched, prices.least)
        if not self._overlap:
            self._saved_s -= time.perf_counter() - began
        return [tuple(guess.token_ids[: guess.taken]) for guess in guesses]

    def _watch(self, sequences: Seq[Sequence], least: float) -> list[Guess]:
        """Guess for some rows that take no draft tokens, to test how predictable they are."""
        made = []
        self._turn += 1
        stride = -(-len(sequences) // _WATCHED) or 1
        for sequence in sequences[self._turn % stride :: stride]:
            row = self._rows[sequence]
            row.known, row.value = sequence.num_known_tokens, 0.0
            row.guess = self._guess(sequence, row, 1, least)
            made.append(row.guess)
        return made

    def _guess(self, sequence: Sequence, row: _Row, room: int, least: float) -> Guess:
        """What may follow a sequence: at most `room` tokens, as long as the chance is `least`."""
        made, params = Guess(), sequence.request.params
        if room < 1:
            return made
        constraints = self.constraints if params.constraint else None
        if constraints and params.wants_logprobs:  # elsewhere these tokens are there already
            forced = constraints.forced(sequence)[:room]
            if forced:
                return Guess(forced, [_FORCED] * len(forced), [1.0] * len(forced))
        most = min(room, LONGEST)
        made.own = row.lookup.find(most)
        self._go_on(made, sequence, row, most, least)
        if constraints and made.token_ids:
            allowed = constraints.allowed(sequence, made.token_ids)
            for each in (made.token_ids, made.kinds, made.chances):
                del each[allowed:]
        return made

    def _go_on(self, made: Guess, sequence: Sequence, row: _Row, most: int, least: float) -> None:
        """Add the likeliest tokens to a guess, one by one."""
        begin = max(0, row.known - LONGEST_CONTEXT)
        last = sequence.token_ids(begin, row.known - begin)
        of, own, chance = self._chances.of, made.own, 1.0
        for position in range(most):
            found = (
                []
                if self._table is None
                else self._table.find(row.namespace, last[-LONGEST_CONTEXT:])
            )
            best, token = 0.0, -1
            kind: Hashable = None
            copied = own[position] if position < len(own) else -1
            if copied >= 0:
                others = [each[0] == copied for each in found]
                agree = others[0] if others else None
                kind = ("own", row.lookup.length, _size(row.own), agree)
                best, token = of(kind), copied
            for other, length, sure in found:
                if other != copied:
                    named = (length, sure, min(_size(row.streak), 2), copied >= 0)
                    if (likely := of(named)) > best:
                        best, token, kind = likely, other, named
            chance *= best
            # The first is always looked at: whether it turns out right says what to try next.
            if token < 0 or (position and chance < least):
                return
            if token != copied:
                own = []
            made.token_ids.append(token)
            made.kinds.append(kind)
            made.chances.append(chance)
            last.append(token)

    def _judge(self, sequence: Sequence, row: _Row, guess: Guess) -> None:
        """Compare a guess with the tokens that came."""
        came = sequence.token_ids(row.known, sequence.num_known_tokens - row.known)
        right, tested = num_right(guess.token_ids, came), min(len(came), len(guess.token_ids))
        for position, kind in enumerate(guess.kinds[: min(right + 1, tested)]):
            self._chances.note(kind, right=position < right)
        row.rate = 1 - (1 - row.rate) * _KEPT**right
        if not guess.token_ids or right < tested:
            row.rate *= _KEPT
        row.streak = _continued(row.streak, right, tested)
        self._saved_s += min(right, guess.taken) * row.value
        self._hoped += sum(guess.chances[: guess.taken])
        self._came += min(right, guess.taken)
        if self._hoped > _HOPES:
            self._hoped, self._came = self._hoped / 2, self._came / 2
        _count(self._guessed_at, guess.taken)
        _count(self._right_at, min(right, guess.taken))
        if guess.own:
            tested = min(len(guess.own), len(came))
            row.own = _continued(row.own, num_right(guess.own, came), tested)

    def _learn(self, sequence: Sequence, row: _Row) -> None:
        """Put the new tokens of a sequence into the table; those of beams may still change."""
        known = sequence.num_known_tokens
        if self._table is None or sequence.group is not None or known <= row.learned:
            return
        skipped = self._rest.is_resting and sequence.request.row % _LESS
        if self._may_learn > 0 and row.own < _REPEATED and not skipped:
            self._may_learn -= known - row.learned
            begin = max(0, row.learned - LONGEST_CONTEXT)
            ids = sequence.token_ids(begin, known - begin)
            self._table.learn(row.namespace, ids, row.learned - begin)
        row.learned = known


def _namespace(context: tuple[str, ...], constraint: str | None) -> int:
    """What rows must have in common to use each other's tokens."""
    return hash((context, constraint))


def _count(at: list[int], number: int) -> None:
    """Count one token at each of the first `number` positions."""
    at += [0] * (number - len(at))
    for position in range(number):
        at[position] += 1


def _continued(streak: int, right: int, tested: int) -> int:
    """A streak after so many right tokens in a row, out of those tested."""
    return min(streak + right, _LONGEST_STREAK) if right == tested else right


def _size(streak: int) -> int:
    """A streak, roughly."""
    return streak.bit_length()
