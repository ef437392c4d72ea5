"""A sample of the fuzz, over this process's memory; the whole of it is `fuzz.py`'s."""

import pytest
from fuzz import fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations_keep_every_byte_and_rule(seed: int) -> None:
    result = fuzz(operations=4000, seed=seed)
    counts = result["counts"]
    rare = {"copies", "refused_below_shared", "pages_shared", "preempted", "unmaps_to_grow"}
    assert {name for name in rare if not counts.get(name)} == set(), "the sample is too tame"
