"""What the backends hand to their kernels means exactly the tokens that SDPA reads.

The slots are real: a token too far is another sequence's, or a fault that ends the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine import attention
from batchrun.engine.attention import AttentionBackend, Geometry, LayerSpec
from batchrun.engine.attention.flashinfer import FlashInfer, KernelKind, kinds
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.attention.torch_flash import TorchFlash
from batchrun.engine.core import Segment
from tests.attention.slots import (
    DIM,
    TOKENS,
    PrefillModule,
    Slots,
    flash_attention_forward,
    segment,
    slots,
    upload,
)

LAYERS = (
    LayerSpec(4, 2, DIM, DIM, 0.125),
    LayerSpec(2, 2, DIM, DIM, 0.3, window=40),
    LayerSpec(6, 1, DIM, DIM, 0.125, window=1),
    LayerSpec(4, 2, DIM, DIM, 0.07, window=100_000),
)
CAPPED = LayerSpec(4, 2, DIM, DIM, 0.125, softcap=2.0)
CAPPED_MORE = replace(CAPPED, softcap=1.0, scale=0.2)

Make = Callable[[Geometry], AttentionBackend]
BACKENDS: dict[str, Make] = {
    "torch-flash": lambda g: TorchFlash(g, upload, flash_attention_forward),
    "flashinfer-fa2": lambda g: FlashInfer(g, upload, PrefillModule, "flashinfer-fa2"),
    "flashinfer-fa3": lambda g: FlashInfer(g, upload, PrefillModule, "flashinfer-fa3"),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Slots]:
    with slots((*LAYERS, CAPPED, CAPPED_MORE)) as made:
        yield made


def compare(made: Slots, backend: AttentionBackend, segments: list[Segment], layers: range) -> None:
    reference = SDPA()
    reference.plan(segments)
    for index in layers:
        query = made.query(segments, index)
        layer, views = made.attention(index), made.views[index]
        try:
            got = backend.run(layer, query, views)
        except AssertionError as error:  # pytest would show, and read, the views in the frames
            raise AssertionError(str(error)) from None
        torch.testing.assert_close(got, reference.run(layer, query, views))


@st.composite
def steps(draw: st.DrawFn) -> list[Segment]:
    """A few slots, each with some tokens before those that are computed; decodes first."""
    chosen = draw(st.permutations(range(len(TOKENS))))[: draw(st.integers(1, len(TOKENS)))]
    made = []
    for slot in chosen:
        end = draw(st.integers(1, TOKENS[slot]))
        length = draw(st.one_of(st.just(1), st.integers(1, end)))
        made.append(segment(slot, end - length, length))
    return sorted(made, key=lambda s: s.length > 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_any_step_reads_what_sdpa_reads(shared: Slots, name: str) -> None:
    whole = shared.geometry
    layers = range(len(whole.layers) if name != "torch-flash" else len(LAYERS))
    backend = BACKENDS[name](replace(whole, layers=whole.layers[: len(layers)]))

    @settings(max_examples=40, deadline=None)
    @given(steps())
    def run(segments: list[Segment]) -> None:
        backend.plan(segments)
        compare(shared, backend, segments, layers)

    run()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_whole_slot_and_a_single_token_beside_it(shared: Slots, name: str) -> None:
    backend = BACKENDS[name](replace(shared.geometry, layers=LAYERS))
    for segments in ([segment(0, 0, 300)], [segment(1, 0, 1), segment(0, 299, 1)]):
        backend.plan(segments)
        compare(shared, backend, segments, range(len(LAYERS)))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_single_token_behind_a_longer_segment_is_no_decode(shared: Slots, name: str) -> None:
    backend = BACKENDS[name](replace(shared.geometry, layers=LAYERS))
    segments = [segment(4, 16, 1), segment(0, 100, 50), segment(5, 0, 1), segment(2, 0, 64)]
    backend.plan(segments)
    compare(shared, backend, segments, range(len(LAYERS)))


@pytest.mark.parametrize("name", BACKENDS)
def test_fixed_plans_of_as_many_decodes_keep_their_addresses(shared: Slots, name: str) -> None:
    backend = BACKENDS[name](replace(shared.geometry, layers=LAYERS))
    addresses: dict[int, list[set[int]]] = {}
    plans = [[3, 1, 4], [5, 0], [0, 2, 5], [2, 4], [1, 2, 3]]
    for step, chosen in enumerate(plans):
        segments = [segment(slot, (TOKENS[slot] - 1) // (step + 1), 1) for slot in chosen]
        backend.plan(segments, fixed=True)
        compare(shared, backend, segments, range(len(LAYERS)))
        addresses.setdefault(len(chosen), []).append(tensors_of(backend))
        backend.plan([segment(0, 10, 200), segment(5, 3, 40)])  # prefills come in between
    for found in addresses.values():
        assert all(one == found[0] for one in found)
        assert len(found[0]) >= 3


def tensors_of(backend: AttentionBackend) -> set[int]:
    """Addresses of what the next launches read."""
    if isinstance(backend, TorchFlash):
        launches = backend._decodes.values()
        return {t.data_ptr() for one in launches for t in (one.starts, one.key_starts, one.used)}
    assert isinstance(backend, FlashInfer)
    decodes = backend._parts[0]
    ints = {plan.ints.data_ptr() for plan in decodes.plans.values()}
    return ints | {t.data_ptr() for t in decodes.arrays}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_fixed_plan_takes_single_tokens_only(shared: Slots, name: str) -> None:
    backend = BACKENDS[name](replace(shared.geometry, layers=LAYERS))
    with pytest.raises(ValueError, match="single tokens"):
        backend.plan([segment(0, 0, 2)], fixed=True)
    with pytest.raises(ValueError, match="would freeze"):
        SDPA().plan([segment(0, 0, 1)], fixed=True)


def test_slots_at_the_far_end_of_the_address_space_do_not_wrap() -> None:
    calls = []

    def kernel(*arguments: object, **named: object) -> tuple[torch.Tensor]:
        calls.append(arguments)
        return (torch.empty(0),)

    geometry = Geometry(LAYERS[:1], 1 << 20, 2047, 4, 8, torch.bfloat16, torch.device("meta"))
    backend = TorchFlash(replace(geometry, device=torch.device("cpu")), upload, kernel)
    backend.plan([segment(2046, (1 << 20) - 1, 1), segment(2045, 5, 1)])
    views = torch.empty(2047, 1 << 20, 2, DIM, device="meta")
    backend.run(attention.LayerAttention(0.1), torch.empty(2, 4, DIM), (views, views))
    key_starts = calls[0][4]
    assert isinstance(key_starts, torch.Tensor)
    assert key_starts[:2].tolist() == [2046 << 20, 2045 << 20]


def flashinfer(shared: Slots, ctas: int) -> tuple[FlashInfer, PrefillModule]:
    """A backend for one kind of layer, on a device that runs so many blocks at once."""
    modules: dict[KernelKind, PrefillModule] = {}
    backend = FlashInfer(
        replace(shared.geometry, layers=LAYERS[:1]),
        upload,
        lambda kind: modules.setdefault(kind, PrefillModule(kind)),
        "flashinfer-fa2",
    )
    backend._ctas = ctas
    (module,) = modules.values()
    return backend, module


def test_flashinfer_takes_turns_with_pinned_buffers(shared: Slots) -> None:
    backend, module = flashinfer(shared, 100)
    for step in range(5):
        backend.plan([segment(0, 20 + 64 * step, 1)])
    pinned = [plan["buffers"][2] for plan in module.plans]
    assert all(one != other for one, other in pairwise(pinned))
    assert len(set(pinned)) == 2


@pytest.mark.parametrize("ctas", [100, 1])  # at 1 no graph's decodes are split
def test_flashinfer_plans_decodes_anew_where_the_plan_is_another(shared: Slots, ctas: int) -> None:
    backend, module = flashinfer(shared, ctas)
    block, split = backend._block, ctas == 100
    for ends, fixed, anew in (
        ((1,), False, True),
        ((block,), False, False),  # as many blocks
        ((block + 1,), False, True),
        ((block + 1,), True, True),  # a graph's plan is another one
        ((block + 1,), True, False),
        ((2 * block + 1,), True, split),
        ((block + 1, 1), True, True),
        ((1, block + 1), True, split),
        ((1, block + 1), False, True),
    ):
        before = len(module.plans)
        backend.plan([segment(slot, end - 1, 1) for slot, end in enumerate(ends)], fixed=fixed)
        assert len(module.plans) - before == anew, (ends, fixed)


def test_flashinfer_never_splits_a_graph_that_fills_the_device(shared: Slots) -> None:
    backend, module = flashinfer(shared, 4)  # two decodes of two key heads
    for count, whole in ((1, False), (2, True), (3, True)):
        backend.plan([segment(slot, 0, 1) for slot in range(count)], fixed=True)
        total, batch, *_, split, disable, colocated, uniform = module.plans[-1]["numbers"]
        assert (total, batch, split, colocated, uniform) == (count, count, -1, 0, 1)
        assert disable is whole
    backend.plan([segment(slot, 0, 1) for slot in range(3)])
    assert module.plans[-1]["numbers"][-4:] == (-1, False, 0, 0)


def test_a_graph_that_would_be_planned_otherwise_is_an_error(shared: Slots) -> None:
    class Fickle(PrefillModule):
        def plan(self, *arguments: object) -> list[int]:
            super().plan(*arguments)
            return [len(self.plans)]

    geometry = replace(shared.geometry, layers=(LAYERS[0],))
    backend = FlashInfer(geometry, upload, Fickle, "flashinfer-fa2")
    backend._ctas = 100
    backend.plan([segment(0, 3, 1)], fixed=True)
    with pytest.raises(RuntimeError, match="graph of 1 decodes"):
        backend.plan([segment(0, 3 + backend._block, 1)], fixed=True)


def test_layers_that_differ_in_scale_alone_share_plans_and_modules(shared: Slots) -> None:
    layers = (CAPPED, CAPPED_MORE, LAYERS[0], LAYERS[3])
    geometry = replace(shared.geometry, layers=layers)
    assert kinds(geometry, "flashinfer-fa3") == [
        KernelKind(library, DIM, window, softcap)
        for library in ("fa2", "fa3")
        for window, softcap in ((False, False), (False, True), (True, False))
    ]
    backend = FlashInfer(geometry, upload, PrefillModule, "flashinfer-fa2")
    assert [len(part.plans) for part in backend._parts] == [3, 3]
