# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, PLR0915, PLR0917 - types, names and calls are Triton's
"""Attention over slots in Triton (Tillet et al. 2019), in which a query's bits are its own.

Only `triton_attention` imports this file, and only if Triton is installed.

    keys      |<------ PART ------>|<------ PART ------>|<------ PART ------>|
    blocks    |  BLOCK_N |         |          |         |      #   |         .   # the query's own
    softmax   |     of its own     |     of its own     |  of its own |
    the query's result: the parts, added up in order

Parts and blocks begin at fixed positions, and every query goes through those that it sees in this
order, as a row of a tile of one shape. Keys that it does not see weigh exactly 0. So neither the
queries beside it, nor the programs that share the work, change a bit of it. A product and a sum
become one rounding or two as the compiler likes, perhaps differently in two kernels: where it
could, there is an explicit `fma`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lowest(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that a query at `position` sees; 0 is no window, or no chunks."""
    low = position * 0
    if WINDOW:
        low = tl.maximum(low, position - (WINDOW - 1))
    if CHUNK:
        low = tl.maximum(low, position - position % CHUNK)
    return low


@triton.jit
def _weigh(top, total, sums, scores, unit):
    """Weigh a block's scores, and scale a part's sums to them: the products are yet to be added."""
    highest = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shift = tl.broadcast_to((base * unit)[:, None], scores.shape)
    weights = tl.exp2(tl.fma(scores, unit, -shift))
    old = tl.exp2((top - base) * unit)
    return highest, tl.fma(total, old, tl.sum(weights, 1)), sums * old[:, None], weights


@triton.jit
def _add(top, total, sums, part_top, part_total, part_sums, unit):
    """Add a part to those before it. Of each row: the highest score, and sums relative to it."""
    highest = tl.maximum(top, part_top)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    old, new = tl.exp2((top - base) * unit), tl.exp2((part_top - base) * unit)
    total = tl.fma(total, old, part_total * new)
    sums = tl.fma(sums, tl.broadcast_to(old[:, None], sums.shape), part_sums * new[:, None])
    return highest, total, sums


@triton.jit
def _finish(top, total, sums, sinks, heads, unit, sink_unit, HAS_SINKS: tl.constexpr):
    """The result of each row, once the sink's logit has been added."""
    if HAS_SINKS:
        sink = tl.load(sinks + heads).to(tl.float32) * sink_unit
        one = sink * 0 + 1
        top, total, sums = _add(top, total, sums, sink, one, sums * 0, unit)
    return sums / total[:, None]


@triton.jit(do_not_specialize_on_alignment=["items", "segments"])
def attend(
    q,
    k,
    v,
    out,
    partial,
    sinks,
    items,
    segments,
    unit,
    sink_unit,
    cap,
    cap_unit,
    q_token,
    q_head,
    k_slot,
    k_token,
    k_head,
    v_slot,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Compute an item with one key head: some parts of BLOCK_M pairs of a query and a head.

    It is either all parts that the queries see, or a run of them, each of which goes to `partial`.
    Past the end of a segment's pairs the last query is repeated, and not stored.
    """
    item = items + tl.program_id(0) * 5
    segment = tl.load(item)
    if segment < 0:
        return
    tile, first, count = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    place = tl.load(item + 4)
    about = segments + segment * 6
    slot, start = tl.load(about).to(tl.int64), tl.load(about + 1)
    length, token = tl.load(about + 2), tl.load(about + 3)
    kv_head = tl.program_id(1)

    pairs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pairs < length * GROUP
    query = tl.minimum(pairs // GROUP, length - 1)
    head = kv_head * GROUP + pairs % GROUP
    position = start + query
    low = _lowest(position, WINDOW, CHUNK)
    last = start + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
    tile_low = _lowest(start + tile * BLOCK_M // GROUP, WINDOW, CHUNK)

    k_at, v_at = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    row = (token + query).to(tl.int64)
    queries = tl.load(
        q + (row * q_token + head * q_head)[:, None] + k_at[None, :],
        mask=(k_at < K_DIM)[None, :],
        other=0.0,
    )
    k += slot * k_slot + kv_head * k_head
    v += slot * v_slot + kv_head * v_head

    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    part_end = tl.minimum(first + count, last // PART + 1)
    for part in range(tl.maximum(first, tile_low // PART), part_end):
        part_top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        part_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        part_sums = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        begin = tl.maximum(part * PART, tile_low // BLOCK_N * BLOCK_N)
        for block in range(begin, tl.minimum(part * PART + PART, last + 1), BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            there = keys <= last  # behind it there may be no memory
            far = keys.to(tl.int64)
            mask = there[None, :]
            if K_DIM != BLOCK_K:
                mask &= (k_at < K_DIM)[:, None]
            loaded = tl.load(k + (far * k_token)[None, :] + k_at[:, None], mask=mask, other=0.0)
            scores = tl.dot(queries, loaded, input_precision="ieee")
            if CAPPED:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                scores = cap * (1.0 - 2.0 / (tl.exp2(scores * cap_unit) + 1.0))
            seen = (keys[None, :] <= position[:, None]) & (keys[None, :] >= low[:, None])
            part_top, part_total, part_sums, weights = _weigh(
                part_top, part_total, part_sums, tl.where(seen, scores, float("-inf")), unit
            )
            mask = there[:, None]
            if V_DIM != BLOCK_V:
                mask &= (v_at < V_DIM)[None, :]
            loaded = tl.load(v + (far * v_token)[:, None] + v_at[None, :], mask=mask, other=0.0)
            part_sums = tl.dot(weights.to(loaded.dtype), loaded, part_sums, input_precision="ieee")
        if place >= 0:  # one query, whose pairs are its heads
            at = partial + ((place + part - first) * HEADS + head).to(tl.int64) * (V_DIM + 2)
            tl.store(at, part_top, mask=inside)
            tl.store(at + 1, part_total, mask=inside)
            stored = inside[:, None] & (v_at < V_DIM)[None, :]
            tl.store(at[:, None] + 2 + v_at[None, :], part_sums, mask=stored)
        top, total, sums = _add(top, total, sums, part_top, part_total, part_sums, unit)
    if place < 0:
        result = _finish(top, total, sums, sinks, head, unit, sink_unit, HAS_SINKS)
        at = out + ((row * HEADS + head) * V_DIM)[:, None] + v_at[None, :]
        stored = inside[:, None] & (v_at < V_DIM)[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize_on_alignment=["segments"])
def combine(
    out,
    partial,
    sinks,
    segments,
    unit,
    sink_unit,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Add up the parts of a segment of one query, if they are in `partial`: for one key head."""
    about = segments + tl.program_id(0) * 6
    place = tl.load(about + 4)
    if place < 0:
        return
    position, row = tl.load(about + 1), tl.load(about + 3).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    head = tl.program_id(1) * GROUP + tl.minimum(group, GROUP - 1)
    v_at = tl.arange(0, BLOCK_V)
    inside = (v_at < V_DIM)[None, :]
    top = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_V), dtype=tl.float32)
    for part in range(_lowest(position, WINDOW, CHUNK) // PART, position // PART + 1):
        at = partial + ((place + part) * HEADS + head).to(tl.int64) * (V_DIM + 2)
        part_sums = tl.load(at[:, None] + 2 + v_at[None, :], mask=inside, other=0.0)
        top, total, sums = _add(top, total, sums, tl.load(at), tl.load(at + 1), part_sums, unit)
    result = _finish(top, total, sums, sinks, head, unit, sink_unit, HAS_SINKS)
    at = out + ((row * HEADS + head) * V_DIM)[:, None] + v_at[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside & (group < GROUP)[:, None])
