"""Keys and values that are written in words of 16 bytes are the same numbers in the same places."""

from __future__ import annotations

import pytest
import torch

from batchrun.engine.executor import as_words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [4, 8, 24, 64])
def test_written_as_words_or_not_at_all(dtype: torch.dtype, dim: int) -> None:
    slab = torch.zeros(3, 20, 4, 2, 2, dim, dtype=dtype)  # slots, tokens, layers, K and V, H, D
    keys, rows = slab[:, :, 1, 0], torch.tensor([5, 21, 59])
    new = torch.randn(2, 3, dim).to(dtype).transpose(0, 1)  # as rotation leaves them
    words, wide = as_words(keys), as_words(new)
    if dim * dtype.itemsize % 16:
        assert words is None
        assert wide is None
        return
    assert words is not None
    assert wide is not None
    words[rows] = wide
    assert torch.equal(keys.reshape(-1, 2, dim)[rows], new)
    assert slab.count_nonzero() == new.count_nonzero()


def test_rows_off_the_words_are_none() -> None:
    merged = torch.zeros(5, 2 * 16 + 4, dtype=torch.bfloat16)
    assert as_words(merged[:, 4:].view(5, 2, 16)) is None
    assert as_words(torch.zeros(16, 2, 5, dtype=torch.bfloat16).permute(2, 1, 0)) is None
