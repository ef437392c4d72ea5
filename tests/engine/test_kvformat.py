"""How keys and values are written: in words of 16 bytes or not, in one format or another."""

from __future__ import annotations

import pytest
import torch

from batchrun.engine import attention
from batchrun.engine.attention import KV, AttentionBackend, Geometry, LayerAttention, LayerSpec
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.kvformat import PLAIN, KVFormat, Write, as_words
from batchrun.engine.model.gates import plain_views, sequences_of, through_slots
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.transfers import Transfers
from tests.parity.models import build


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


def _doubling(slots: torch.Tensor) -> Write:
    write = PLAIN.writer(slots)
    return lambda rows, new: write(rows, new * 2)


DOUBLED = KVFormat("doubled", _doubling)


class _Halving(SDPA):
    """Reads what is twice as large."""

    kv_formats = ("doubled",)

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        return super().run(layer, query, (slots[0] / 2, slots[1] / 2))


def _logits(loaded: LoadedModel, backend: AttentionBackend, kv: KVFormat) -> list[torch.Tensor]:
    sequences = sequences_of(loaded)
    views = plain_views(loaded, sequences)
    executor = TorchExecutor(loaded, views, [], backend, Transfers(), kv_format=kv)
    return [logits for _, logits in through_slots(sequences, executor.logits, 7)]


def test_another_format_takes_a_writer_and_a_kernel_that_reads_it() -> None:
    loaded = prepare(build("llama"))
    want, got = _logits(loaded, SDPA(), PLAIN), _logits(loaded, _Halving(), DOUBLED)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for backend, kv in ((SDPA(), DOUBLED), (_Halving(), PLAIN)):
        with pytest.raises(ValueError, match=f"sdpa can't read {kv.name} keys and values"):
            _logits(loaded, backend, kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_say_what_they_can(dtype: torch.dtype) -> None:
    spec = LayerSpec(4, 2, 64, 64, 0.125)
    geometry = Geometry((spec,), 320, 4, 4, 512, dtype, torch.device("cpu"))
    plain = attention.create("sdpa", geometry)
    assert (plain.writes_kv, plain.max_query, plain.capturable) == (False, 1, False)
    if attention.unsupported_reason("native", geometry) is None:
        native = attention.create("native", geometry)
        assert (native.writes_kv, native.max_query, native.invariant) == (True, None, True)
