"""How often draft tokens of each kind were right."""

from __future__ import annotations

from collections.abc import Hashable

_MEMORY = 512.0  # about so many of a kind count
_UNKNOWN = 0.5  # of what was never tried: high enough to be tried


class Chances:
    """The share of right tokens among the last ones of each kind."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, list[float]] = {}  # right ones, and all

    def note(self, kind: Hashable, *, right: bool) -> None:
        """Note whether a token of a kind was right."""
        each = self._kinds.get(kind)
        if each is None:
            each = self._kinds[kind] = [2 * _UNKNOWN, 2.0]
        if each[1] >= _MEMORY:
            each[0] /= 2
            each[1] /= 2
        each[0] += right
        each[1] += 1

    def of(self, kind: Hashable, unknown: float = _UNKNOWN) -> float:
        """The chance that the next token of a kind is right; `unknown` if none was tried."""
        each = self._kinds.get(kind)
        return unknown if each is None else each[0] / each[1]
