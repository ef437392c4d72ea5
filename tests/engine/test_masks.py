"""Masks leave a row only the tokens that its shape allows, whoever applies them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.plan import Masks
from batchrun.engine.sampling import Sampler
from batchrun.engine.transfers import copied

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def masked(logits: torch.Tensor, masks: Masks) -> torch.Tensor:
    return Sampler(4, copied)._masked(logits.clone(), masks)


def wanted(logits: torch.Tensor, rows: list[int], allowed: list[set[int]]) -> list[list[float]]:
    """Token by token."""
    found = logits.float().tolist()
    for row, tokens in zip(rows, allowed, strict=True):
        kept = {token for token in tokens if token < logits.shape[1]}
        dead = all(found[row][token] == -math.inf for token in kept)
        found[row] = [
            (0.0 if dead else value) if token in kept else -math.inf
            for token, value in enumerate(found[row])
        ]
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[set[int]], int]:
    count, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    value = st.sampled_from([-math.inf, -2.0, 0.0, 1.5, math.inf])
    row = st.lists(value, min_size=vocabulary, max_size=vocabulary)
    dtype = draw(st.sampled_from(DTYPES))
    logits = torch.tensor(draw(st.lists(row, min_size=count, max_size=count)), dtype=dtype)
    rows = draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1).map(sorted))
    words = -(-vocabulary // 32) + draw(st.integers(-1, 1))
    words = max(1, words)
    tokens = st.sets(st.integers(0, 32 * words - 1))
    return logits, rows, [draw(tokens) for _ in rows], words


@settings(max_examples=300, deadline=None)
@given(cases(), st.booleans())
def test_only_what_is_allowed_is_left(
    case: tuple[torch.Tensor, list[int], list[set[int]], int], native: bool
) -> None:
    logits, rows, allowed, words = case
    bits = np.zeros((len(rows), words), np.uint32)
    for at, tokens in enumerate(allowed):
        for token in tokens:
            bits[at, token // 32] |= np.uint32(1 << token % 32)
    masks = Masks(np.array(rows), bits)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(cpu_sampling, "mask", lambda *_: False)
        found = masked(logits, masks)
    assert found.dtype == logits.dtype
    assert found.float().tolist() == wanted(logits, rows, allowed)


@pytest.mark.parametrize("native", [True, False])
def test_what_is_not_a_number_is_not_hidden(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose allowed logits are NaN has no token; it fails as it would without a shape."""
    if not native:
        monkeypatch.setattr(cpu_sampling, "mask", lambda *_: False)
    logits = torch.tensor([[1.0, math.nan, 2.0]])
    found = masked(logits, Masks(np.array([0]), np.array([[2]], np.uint32)))
    assert math.isnan(found[0, 1])
