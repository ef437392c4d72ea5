"""Combinations of which `make test` runs a part and `make crash-test` all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def part(every: int, *axes: Sequence[Any], whole: Iterable[Any] = ()) -> list[Any]:
    """All combinations of values, most of them `long`.

    Args:
        every: One of so many is not long, in a pattern of diagonals. Each value of an axis is in
            one of them if the other axes have `every` values or more.
        axes: Values of each parameter.
        whole: Values of the first parameter of which no combination is long.
    """
    made, whole = [], [*whole]
    for places in product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        mine = sum(places) % every == 0 or values[0] in whole
        made.append(pytest.param(*values, marks=() if mine else pytest.mark.long))
    return made
