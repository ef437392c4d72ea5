"""The arithmetic of pages and tokens, against numbers worked out by hand."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.allocator.layout import KVLayout, LayerKV, planes_of

MIB = 1 << 20


def layout_of(layers, *, dtype_bytes=2, page_size=2 * MIB, max_tokens=8192, layers_per_slab=None):
    return KVLayout(
        tuple(layers), dtype_bytes, page_size, max_tokens, layers_per_slab or len(layers)
    )


def tokens_per_page(layout: KVLayout, group: int) -> Fraction:
    return Fraction(layout.page_size, layout.group_bytes_per_token(group))


def test_qwen3_0_6b() -> None:
    # 2 (K, V) x 28 layers x 8 heads x 128 dims x 2 bytes = 114,688 bytes a token.
    layout = layout_of([LayerKV(8, 128, 128)] * 28)
    assert layout.bytes_per_token == 114_688
    assert tokens_per_page(layout, 0) == Fraction(128, 7)
    assert round(float(tokens_per_page(layout, 0)), 2) == 18.29
    assert layout.pages_for(0) == (0,)
    assert layout.pages_for(18) == (1,)
    assert layout.pages_for(19) == (2,)  # the nineteenth token lies across two pages
    assert layout.pages_for(128) == (7,)
    assert layout.pages_for(129) == (8,)
    assert [layout.whole_pages(n) for n in (0, 18, 19, 127, 128)] == [(0,), (0,), (1,), (6,), (7,)]
    assert [layout.tokens_on((n,)) for n in (0, 1, 7)] == [0, 19, 128]
    assert layout.waste_bytes(128) == 0
    assert layout.waste_bytes(129) == 2 * MIB - 114_688
    assert layout.slab_size(0) == 8192 * 114_688 == 448 * 2 * MIB


def test_llama3_8b_interleaved_and_one_layer_a_slab() -> None:
    # 2 x 32 layers x 8 heads x 128 dims x 2 bytes = 128 KiB a token: 16 tokens a page.
    layers = [LayerKV(8, 128, 128)] * 32
    whole = layout_of(layers)
    assert (whole.bytes_per_token, tokens_per_page(whole, 0)) == (131_072, 16)
    single = layout_of(layers, layers_per_slab=1)
    assert (single.num_groups, tokens_per_page(single, 31)) == (32, 512)
    assert single.total_pages_for(1) == 32
    assert single.waste_bytes(1) == 32 * 2 * MIB - 131_072


def test_smollm2_in_float32_on_the_host() -> None:
    layout = layout_of([LayerKV(3, 64, 64)] * 30, dtype_bytes=4, page_size=256 << 10)
    assert layout.bytes_per_token == 46_080
    assert tokens_per_page(layout, 0) == Fraction(256, 45)
    assert layout.tokens_in([1]) == 5
    assert layout.tokens_in([45]) == 256


def test_layers_of_different_shapes() -> None:
    # A wide layer, a narrow one, and multi-head latent attention's single head without V.
    layers = [LayerKV(4, 64, 32), LayerKV(1, 64, 64), LayerKV(1, 576, 0)]
    layout = layout_of(layers, page_size=4096, layers_per_slab=2)
    assert layout.num_groups == 2
    assert [layout.group_bytes_per_token(g) for g in (0, 1)] == [(384 + 128) * 2, 576 * 2]
    assert layout.bytes_per_token == 1024 + 1152
    assert layout.offsets(0) == (0, 4 * 64 * 2)
    assert layout.offsets(1) == (384 * 2, 384 * 2 + 64 * 2)
    assert layout.offsets(2) == (0, 1152)
    assert [layout.place_of(layer)[1] for layer in range(3)] == [0, 0, 1]
    assert layout.pages_for(4) == (1, 2)
    assert layout.tokens_in([1, 1]) == 3  # the second group holds fewer tokens a page


def test_a_last_group_that_is_not_full() -> None:
    layout = layout_of([LayerKV(1, 8, 8)] * 7, layers_per_slab=3)
    assert layout.groups == (range(0, 3), range(3, 6), range(6, 7))
    assert [layout.group_bytes_per_token(g) for g in range(3)] == [96, 96, 32]
    with pytest.raises(IndexError):
        layout.place_of(7)


def test_a_slot_never_holds_more_than_max_tokens() -> None:
    layout = layout_of([LayerKV(1, 8, 8)], page_size=4096, max_tokens=100)
    assert layout.slot_tokens == 128
    assert layout.slab_size(0) == 4096
    assert layout.tokens_in([1]) == 100


@pytest.mark.parametrize(
    "change",
    [
        {"dtype_bytes": 0},
        {"page_size": 4095},
        {"max_tokens": 0},
        {"layers_per_slab": -1},
    ],
)
def test_layouts_that_cannot_be(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        layout_of([LayerKV(1, 8, 8)], **change)


def test_layers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        KVLayout((), 2, 4096, 8, 1)
    with pytest.raises(ValueError, match="positive"):
        LayerKV(0, 8, 8)
    with pytest.raises(ValueError, match="positive"):
        LayerKV(1, 8, -1)


shapes = st.builds(LayerKV, st.integers(1, 8), st.integers(1, 300), st.integers(0, 300))
layouts = st.builds(
    lambda layers, planes, *more: KVLayout(layers * planes, *more, planes=planes),
    st.lists(shapes, min_size=1, max_size=6).map(tuple),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([4096, 65536]),
    st.integers(1, 5000),
    st.integers(1, 7),
)


@settings(deadline=None)
@given(layouts, st.data())
def test_pages_and_tokens_are_inverse(layout: KVLayout, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, layout.max_tokens))
    pages = layout.pages_for(tokens)
    assert layout.tokens_in(pages) >= tokens
    assert layout.slot_tokens % 16 == 0
    for group, count in enumerate(pages):
        used = tokens * layout.group_bytes_per_token(group)
        assert (count - 1) * layout.page_size < used <= count * layout.page_size or count == 0
        assert count * layout.page_size <= layout.slab_size(group)
        assert layout.slab_size(group) % layout.page_size == 0
        assert layout.slab_size(group) == layout.slot_tokens * layout.group_bytes_per_token(group)
    assert 0 <= layout.waste_bytes(tokens) < layout.num_groups * layout.page_bytes
    fewer = [max(0, count - 1) for count in pages]
    assert tokens == 0 or layout.tokens_in(fewer) < tokens


@settings(deadline=None)
@given(layouts)
def test_every_byte_of_a_token_belongs_to_one_tensor(layout: KVLayout) -> None:
    groups, planes = range(layout.num_groups), range(layout.planes)
    owners = [[[0] * layout.group_bytes_per_token(g) for g in groups] for _ in planes]
    for layer, shape in enumerate(layout.layers):
        plane, group, _ = layout.place_of(layer)
        record = owners[plane][group]
        for begin, dim in zip(layout.offsets(layer), (shape.k_dim, shape.v_dim), strict=True):
            for byte in range(begin, begin + shape.kv_heads * dim * layout.dtype_bytes):
                record[byte] += 1
    assert all(count == 1 for plane in owners for record in plane for count in record)
    assert sum(len(record) for plane in owners for record in plane) == layout.bytes_per_token


def test_slabs_that_are_alike_are_planes() -> None:
    one, other = LayerKV(3, 64, 64), LayerKV(1, 64, 64)
    assert planes_of((one,) * 30, 1) == 30
    assert planes_of((one, other) * 3, 2) == 3
    assert planes_of((one,) * 30, 30) == 1
    assert planes_of((one,) * 5, 2) == 1, "the last one is shorter"
    assert planes_of((one, other) * 3, 1) == 1
    with pytest.raises(ValueError, match="4 layers do not form 2 equal planes"):
        KVLayout((one, one, other, one), 2, 4096, 8, 1, planes=2)
    with pytest.raises(ValueError, match="5 layers do not form 2 equal planes"):
        KVLayout((one,) * 5, 2, 4096, 8, 1, planes=2)
