"""Attention in Triton over real slots: what SDPA reads and computes, and the same bits however.

A token too far is another sequence's, or a fault that ends the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from batchrun.engine.attention import LayerAttention, LayerSpec, triton_attention
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.attention.triton_attention import Blocks, TritonAttention
from batchrun.engine.core import Segment
from tests.attention.slots import TOKENS, Slots, segment, slots, upload
from tests.attention.test_kernels import steps

LAYERS = {
    "plain": LayerSpec(4, 2, 64, 64, 0.125),
    "one head": LayerSpec(1, 1, 16, 16, 0.25),
    "wide group": LayerSpec(34, 1, 16, 16, 0.25),  # more heads than a tile has rows
    "odd group": LayerSpec(6, 2, 32, 32, 0.2),
    "widths": LayerSpec(4, 2, 40, 24, 0.125),
    "window": LayerSpec(4, 2, 32, 32, 0.3, window=40),
    "narrow": LayerSpec(2, 2, 16, 16, 0.3, window=1),
    "never narrow": LayerSpec(4, 4, 16, 16, 0.3, window=100_000),
    "cap": LayerSpec(4, 2, 32, 32, 0.4, softcap=2.0),
    "sinks": LayerSpec(4, 2, 16, 16, 0.25, window=90, sinks=True),
    "chunk": LayerSpec(4, 2, 32, 32, 0.2, chunk=50),
}
NAMES = list(LAYERS)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Parts and tiles small enough for short sequences to have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "PART", 32)
        patch.setattr(triton_attention, "blocks_for", lambda *_: Blocks(32, 32, 4, 1))
        yield


@pytest.fixture(scope="module")
def shared() -> Iterator[Slots]:
    with slots(tuple(LAYERS.values())) as made:
        yield made


def attention(index: int) -> LayerAttention:
    spec = LAYERS[NAMES[index]]
    sinks = torch.linspace(-2, 2, spec.q_heads) if spec.sinks else None
    return LayerAttention(spec.scale, spec.window, spec.softcap, sinks, spec.chunk)


def backend(made: Slots, programs: int) -> TritonAttention:
    return TritonAttention(made.geometry, upload, programs)


def queries(index: int) -> torch.Tensor:
    """For each slot and position `[slots, tokens, Hq, Dk]`, heads before tokens in memory."""
    spec = LAYERS[NAMES[index]]
    generator = torch.Generator().manual_seed(index)
    drawn = torch.randn(len(TOKENS), spec.q_heads, max(TOKENS), spec.k_dim, generator=generator)
    return drawn.transpose(1, 2)


def run(
    made: Slots, kernel: TritonAttention | SDPA, segments: Sequence[Segment], index: int
) -> torch.Tensor:
    drawn = queries(index)
    query = torch.cat([drawn[s.slot, s.start : s.start + s.length] for s in segments])
    return kernel.run(attention(index), query, made.views[index])


STEPS = (
    [segment(5, 199, 1), segment(1, 0, 1), segment(3, 128, 1)],
    [segment(5, 60, 1), segment(2, 0, 1), segment(3, 60, 40), segment(4, 0, 17)],
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("programs", [1, 100])
def test_a_step_is_what_sdpa_computes(shared: Slots, name: str, programs: int) -> None:
    index, kernel, reference = NAMES.index(name), backend(shared, programs), SDPA()
    for segments in STEPS:
        kernel.plan(segments)
        reference.plan(segments)
        got = run(shared, kernel, segments, index)
        want = run(shared, reference, segments, index)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_any_step_reads_what_sdpa_reads(shared: Slots) -> None:
    kernel, reference = backend(shared, 40), SDPA()

    @settings(max_examples=3, deadline=None)
    @given(steps())
    def check(segments: list[Segment]) -> None:
        kernel.plan(segments)
        reference.plan(segments)
        got, want = (run(shared, one, segments, 1) for one in (kernel, reference))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_a_querys_bits_are_its_own(shared: Slots, name: str) -> None:
    """As a prompt, in chunks, as decodes, alone or beside others, divided or not."""
    index = NAMES.index(name)
    few, many = backend(shared, 1), backend(shared, 100)
    few.plan(prompt := [segment(3, 0, 70)])
    whole = run(shared, few, prompt, index)
    beside = [segment(5, 90, 1), segment(2, 30, 1)]
    for start, length in ((0, 45), (45, 25), (69, 1), (31, 1), (32, 1)):
        for kernel, others in ((few, beside), (many, [])):
            own = segment(3, start, length)
            kernel.plan(segments := [*others, own])
            got = run(shared, kernel, segments, index)[-length:]
            assert torch.equal(got, whole[start : start + length])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    spec = LAYERS["plain"]
    views = [torch.randn(2, 80, spec.kv_heads, 64).to(dtype) for _ in range(2)]
    query = torch.randn(50, spec.q_heads, 64).to(dtype)
    with slots((spec,)) as made:
        kernel = TritonAttention(replace(made.geometry, dtype=dtype), upload, 100)
    layer = LayerAttention(spec.scale)
    kernel.plan([segment(1, 20, 50)])
    got = kernel.run(layer, query, (views[0], views[1]))
    reference = SDPA()
    reference.plan([segment(1, 20, 50)])
    want = reference.run(layer, query.float(), (views[0].float(), views[1].float()))
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
    for i in (0, 31, 49):
        kernel.plan([segment(1, 20 + i, 1)])
        assert torch.equal(kernel.run(layer, query[i : i + 1], (views[0], views[1]))[0], got[i])


def test_fixed_plans_of_as_many_decodes_keep_their_addresses(shared: Slots) -> None:
    kernel, reference = backend(shared, 100), SDPA()
    addresses: dict[int, list[list[tuple[int, int]]]] = {}
    for step, chosen in enumerate([[3, 1, 4], [5, 0], [0, 2, 5], [2, 4], [1, 2, 3]]):
        segments = [segment(slot, (TOKENS[slot] - 1) // (step + 1), 1) for slot in chosen]
        kernel.plan(segments, fixed=True)
        reference.plan(segments)
        for name in ("plain", "wide group", "window"):
            index = NAMES.index(name)
            got = run(shared, kernel, segments, index)
            want = run(shared, reference, segments, index)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        launches = kernel._launches.values()
        read = [(t.data_ptr(), len(t)) for one in launches for t in (one.items, one.segments)]
        addresses.setdefault(len(chosen), []).append(read)
        kernel.plan([segment(0, 10, 200), segment(5, 3, 40)])  # prompts come in between
    for found in addresses.values():
        assert all(one == found[0] for one in found)
    with pytest.raises(ValueError, match="single tokens"):
        kernel.plan([segment(0, 0, 2)], fixed=True)


def test_without_room_for_parts_decodes_are_not_divided(shared: Slots) -> None:
    kernel, whole = backend(shared, 100), backend(shared, 1)
    segments = [segment(0, 299, 1), segment(5, 199, 1)]
    for places, divided in ((17, [True, True]), (16, [True, False]), (9, [False, False])):
        kernel._places = places
        for one in (kernel, whole):
            one.plan(segments)
        launch = kernel._launches[kernel._kinds[0]]
        assert (launch.segments[:, 4] >= 0).tolist() == divided
        got, want = (run(shared, one, segments, 0) for one in (kernel, whole))
        assert torch.equal(got, want)
