"""When to ask a draft model: where its guesses will probably save more than they cost."""

from __future__ import annotations

import time
from collections.abc import Hashable
from collections.abc import Sequence as Seq

from batchrun.engine.core import Sequence
from batchrun.engine.speculation.chances import Chances
from batchrun.engine.speculation.choice import Guess, Prices, worthwhile
from batchrun.engine.speculation.proposers import DraftModel

_UNTRIED = 0.5  # chance of the first token of a draft model that was never asked
_AGAIN = 1000  # steps without it after which it is as if never asked: other rows, or fewer, run
_POSITIONS = 4  # that have chances of their own; later ones have the last one's


class ModelGuesses:
    """Has a draft model guess for rows that nothing else is as good a guess for.

    It takes a step of its own for each token, so it is asked for as many as make tokens a second
    most, or for none: mostly when few rows are left, whose steps are short of work.

    Args:
        model: The draft model.
        chances: Counts how often its tokens were right.
        most: Maximum number of draft tokens for a row.
    """

    def __init__(self, model: DraftModel, chances: Chances, most: int) -> None:
        self.model, self._chances, self._most = model, chances, most
        self._unasked = 0  # steps since it was asked

    def improve(self, asked: Seq[tuple[Sequence, int, Guess]], prices: Prices) -> float:
        """Replace guesses by the draft model's, where that pays.

        Args:
            asked: Rows, how many draft tokens each may take, and what is guessed so far.
            prices: What a step costs.

        Returns:
            The seconds that it took.
        """
        kinds: list[Hashable] = [("model", min(i, _POSITIONS - 1)) for i in range(self._most)]
        chances, chance, so_far = list[float](), _UNTRIED, 1.0
        self._unasked += 1
        for kind in kinds:  # a position that was never reached is as good as the one before it
            chance = self._chances.of(kind, chance)
            if self._unasked > _AGAIN and not chances:
                chance = max(chance, _UNTRIED)
            so_far *= chance
            chances.append(so_far)
        theirs = [
            (sequence, room, guess)
            for sequence, room, guess in asked
            if room > 0 and guess.expected < sum(chances[:room])
        ]
        count = self._worthwhile(asked, theirs, chances, prices)
        if not count:
            return 0.0
        self._unasked, began = 0, time.perf_counter()
        found = self.model.guess([(sequence, min(room, count)) for sequence, room, _ in theirs])
        for (_, _, guess), token_ids in zip(theirs, found, strict=True):
            if number := len(token_ids):
                guess.token_ids, guess.kinds = list(token_ids), kinds[:number]
                guess.chances, guess.own = chances[:number], []
        return time.perf_counter() - began

    def _worthwhile(
        self,
        asked: Seq[tuple[Sequence, int, Guess]],
        theirs: Seq[tuple[Sequence, int, Guess]],
        chances: Seq[float],
        prices: Prices,
    ) -> int:
        """How many tokens to ask for."""
        if not theirs:
            return 0
        taken, expected = worthwhile([guess for _, _, guess in asked], prices)
        best = expected / (prices.step + prices.spent(sum(taken)))
        rows = {sequence for sequence, _, _ in theirs}
        taken, expected = worthwhile([g for s, _, g in asked if s not in rows], prices)
        each, found = self.model.cost(list(rows), prices.step), 0
        for count in range(1, len(chances) + 1):
            expected += chances[count - 1] * sum(room >= count for _, room, _ in theirs)
            drafts = sum(taken) + sum(min(room, count) for _, room, _ in theirs)
            seconds = prices.step + prices.spent(drafts) + count * each
            if drafts <= prices.places and expected / seconds > best:
                best, found = expected / seconds, count
        return found
