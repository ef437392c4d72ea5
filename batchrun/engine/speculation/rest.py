"""When guessing should rest, because it takes more time than it saves."""

from __future__ import annotations

_TRIAL = 16  # steps after which guessing is judged
_LONGEST = 64  # steps that it rests at most


class Rest:
    """Judges guessing by what it saved: while it loses time, it rests for longer and longer.

    To guess takes some twenty microseconds for each row, which a small model's steps are short
    enough to feel where little can be guessed. In a batch that drains, steps cost more for each
    row: with half the rows, guessing is tried again.
    """

    def __init__(self) -> None:
        self._trial, self._left, self._length = 0, 0, 0  # steps
        self._rows, self._saved = 0, 0.0  # of the last step of a trial; when the trial began

    @property
    def is_resting(self) -> bool:
        """Whether it rests."""
        return self._left > 0

    def wake(self) -> None:
        """Let guessing be tried again."""
        self._left = 0

    def rests(self, rows: int, saved: float) -> bool:
        """Whether to guess nothing in the next step.

        Args:
            rows: The step's rows.
            saved: Seconds that guessing has gained so far; less if it loses.
        """
        if self._left and 2 * rows <= self._rows:
            self._left = self._length = 0
        if self._trial == _TRIAL:
            self._trial = 0
            lost = saved < self._saved
            self._left = self._length = min(max(_TRIAL, 2 * self._length), _LONGEST) if lost else 0
        if self._left:
            self._left -= 1
            return True
        if self._trial == 0:
            self._saved = saved
        self._rows = rows
        self._trial += 1
        return False
