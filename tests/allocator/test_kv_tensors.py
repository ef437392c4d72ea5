"""Torch sees the slabs as K and V of each layer, in place."""

import pytest
import torch
from memory_twins import DEVICE, PAGE, Twin, open_memory, opened

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views, strided_view
from batchrun.allocator.vmm import VirtualMemory


@pytest.fixture
def arena(memory: VirtualMemory) -> KVArena:
    layers = (LayerKV(2, 16, 16), LayerKV(1, 24, 8), LayerKV(3, 8, 8))
    return KVArena(memory, KVLayout(layers, 4, PAGE, 100, 2), num_slots=3)


def test_shapes_and_strides(arena: KVArena) -> None:
    k, v = layer_views(arena, 1, torch.float32, DEVICE)
    tokens = arena.layout.slot_tokens
    assert k.shape == (3, tokens, 1, 24)
    assert v.shape == (3, tokens, 1, 8)
    token, slab = (64 + 32), arena.layout.slab_size(0) // 4
    assert k.stride() == (slab, token, 24, 1)
    assert v.stride() == (slab, token, 8, 1)
    assert k.data_ptr() == arena.address(0) + 64 * 4
    assert v.data_ptr() == k.data_ptr() + 24 * 4
    assert layer_views(arena, 2, torch.float32, DEVICE)[0].data_ptr() == arena.address(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_indexed_writes_land_where_the_layout_says(arena: KVArena, dtype: torch.dtype) -> None:
    slots = [arena.open(), arena.open()]
    for slot in slots:
        assert arena.ensure(slot, 60)
    k, v = layer_views(arena, 0, dtype, DEVICE)
    x = torch.arange(3 * 2 * 16, device=DEVICE).reshape(3, 2, 16).to(dtype)
    k[torch.tensor([slots[1], slots[0], slots[1]]), torch.tensor([59, 3, 0])] = x
    v[torch.tensor([slots[1]] * 3), torch.tensor([1, 2, 3])] = -x
    assert torch.equal(k[slots[1], :60][[59, 0]], x[[0, 2]])
    layout = arena.layout
    at = arena.address(0) + slots[1] * layout.slab_size(0) + 2 * layout.group_bytes_per_token(0)
    raw = Twin(arena.memory).read(at + layout.offsets(0)[1], 32 * 4)
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=dtype), -x[1].flatten().cpu())


def test_all_slots_are_one_tensor_of_tokens(arena: KVArena) -> None:
    slots = [arena.open(), arena.open(), arena.open()]
    assert arena.ensure(2, 40)
    for layer in range(3):
        for view in layer_views(arena, layer, torch.float32, DEVICE):
            flat = view.view(-1, *view.shape[2:])  # raises if it were a copy
            flat[2 * arena.layout.slot_tokens + 39] = layer + 1.5
            assert (view[2, 39] == layer + 1.5).all()
    assert sorted(slots) == [0, 1, 2]


def test_views_of_different_layers_never_overlap(arena: KVArena) -> None:
    slot = arena.open()
    assert arena.ensure(slot, 100)
    views = [
        view for layer in range(3) for view in layer_views(arena, layer, torch.float32, DEVICE)
    ]
    for number, view in enumerate(views):
        view[slot, :100] = number
    for number, view in enumerate(views):
        tokens = view[slot, :100]
        assert torch.equal(tokens, torch.full_like(tokens, number))


def test_attention_over_a_slab_view_equals_attention_over_a_copy(arena: KVArena) -> None:
    slot = arena.open()
    assert arena.ensure(slot, 37)
    k, v = layer_views(arena, 2, torch.float32, DEVICE)
    k[slot, :37], v[slot, :37] = torch.randn(2, 37, 3, 8, device=DEVICE)
    q = torch.randn(3, 5, 8, device=DEVICE)
    attend = torch.nn.functional.scaled_dot_product_attention
    got = attend(q, k[slot, :37].transpose(0, 1), v[slot, :37].transpose(0, 1))
    copies = [x[slot, :37].clone().transpose(0, 1).contiguous() for x in (k, v)]
    torch.testing.assert_close(got, attend(q, *copies))


def test_bfloat16_rounds_like_torch(memory: VirtualMemory) -> None:
    arena = KVArena(memory, KVLayout((LayerKV(1, 8, 8),), 2, PAGE, 10, 1), num_slots=1)
    slot = arena.open()
    assert arena.ensure(slot, 10)
    k, _ = layer_views(arena, 0, torch.bfloat16, DEVICE)
    x = torch.randn(10, 1, 8, device=DEVICE)
    k[slot, :10] = x
    assert torch.equal(k[slot, :10], x.bfloat16())


def test_ninety_gigabytes_of_slots_cost_nothing_to_view() -> None:
    with opened(open_memory(256 << 10)) as memory:
        layout = KVLayout((LayerKV(3, 64, 64),) * 30, 4, memory.granularity, 8192, 30)
        arena = KVArena(memory, layout, num_slots=256)
        views = [layer_views(arena, layer, torch.float32, DEVICE) for layer in range(30)]
        assert arena.usage().reserved > 90e9
        assert arena.usage().mapped == 0
        slot = [arena.open() for _ in range(256)][-1]
        assert arena.ensure(slot, 8192)  # the far end: element offsets beyond 32 bits
        k, v = views[29]
        k[torch.tensor([slot]), torch.tensor([8191])] = 1.0
        v[slot, 8191] = 2.0
        assert (k[slot, 8191].sum(), v[slot, 8191].sum()) == (192, 384)


def test_a_view_that_leaves_its_range_is_refused(arena: KVArena) -> None:
    address = arena.address(0)
    assert strided_view(address, 400, (10, 10), (10, 1), torch.float32).shape == (10, 10)
    for shape, strides, offset in (((10, 10), (10, 1), 1), ((11, 1), (10, 1), 0), ((1,), (1,), -1)):
        with pytest.raises(ValueError, match="range of 400 bytes"):
            strided_view(address, 400, shape, strides, torch.float32, offset=offset)


def test_a_dtype_of_another_size_is_refused(arena: KVArena) -> None:
    with pytest.raises(ValueError, match="bfloat16 has 2 bytes, but the layout has 4"):
        layer_views(arena, 0, torch.bfloat16)
