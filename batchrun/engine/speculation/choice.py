"""How many draft tokens a step should take: as many as make tokens a second most."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

HOPELESS = 0.02  # chance below which a token is not worth a thought, even where it is free


@dataclass(slots=True)
class Guess:
    """Tokens that may come next, each with its kind and the chance that all up to it are right.

    `own` is what the row's own text has next. The step computes the first `taken` ones.
    """

    token_ids: list[int] = field(default_factory=list)
    kinds: list[Hashable] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    taken: int = 0

    @property
    def expected(self) -> float:
        """How many of its tokens will probably be right, if all are computed."""
        return sum(self.chances)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a step costs, and draft tokens in it.

    Args:
        step: Seconds of a step with one token for each row.
        draft: Seconds of each draft token.
        free: Number of draft tokens that cost nothing.
        places: Maximum number of draft tokens.
        rows: The step's rows: as many tokens come for certain.
        margin: How many times its cost a draft token must be worth.
    """

    step: float
    draft: float
    free: int
    places: int
    rows: int
    margin: float = 1.0

    @property
    def least(self) -> float:
        """The chance below which no token pays."""
        return HOPELESS if self.free else max(HOPELESS, self.draft * self.rows / self.step)

    def spent(self, count: int) -> float:
        """Seconds of so many draft tokens."""
        return self.draft * max(0, count - self.free)


def worthwhile(guesses: Seq[Guess], prices: Prices) -> tuple[list[int], float]:
    """How many tokens of each guess to compute, so that tokens a second are most.

    Args:
        guesses: Of the rows that may take draft tokens.
        prices: What they cost.

    Returns:
        The numbers, and the tokens that the step will probably yield.
    """
    chances = sorted((c for g in guesses for c in g.chances), reverse=True)
    count, expected = 0, float(prices.rows)
    cut, at_cut = 1.1, 0  # the least chance taken, and how many of just that chance
    for chance in chances[: prices.places]:
        costs = prices.spent(count + 1) - prices.spent(count)
        worth = chance * (prices.step + prices.spent(count))
        if chance < HOPELESS or worth <= prices.margin * costs * expected:
            break
        count, expected = count + 1, expected + chance
        at_cut = at_cut + 1 if chance == cut else 1
        cut = chance
    taken = [0] * len(guesses)
    for i, guess in enumerate(guesses):
        for chance in guess.chances:
            if chance < cut or (chance == cut and not at_cut):
                break
            at_cut -= chance == cut
            taken[i] += 1
    return taken, expected
