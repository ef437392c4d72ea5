"""Aliases, fences and mapping beside work that is still running on the device."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
import torch

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views, strided_view
from tests.allocator.invariants import check_arena

TOKEN = 1024  # bytes: two layers of 64 + 64 int32


def words(memory: Any, address: int, pages: int, device: str) -> torch.Tensor:
    count = pages * memory.granularity // 4
    return strided_view(address, 4 * count, [count], [1], torch.int32, device=device)


def busy(device: str) -> None:
    """Keep the device behind the host for some milliseconds."""
    if device == "cuda":
        torch.cuda._sleep(5_000_000)


def make_arena(memory: Any, *, slots: int, pages: int, budget: int | None = None) -> KVArena:
    layout = KVLayout(
        (LayerKV(1, 64, 64),) * 2, 4, memory.granularity, pages * memory.granularity // TOKEN, 2
    )
    return KVArena(memory, layout, num_slots=slots, budget=budget)


def test_a_write_through_one_alias_is_read_through_the_other(memory: Any, device: str) -> None:
    size = 2 * memory.granularity
    handles = memory.create(2)
    first, second = memory.reserve(size), memory.reserve(size)
    memory.map(first, handles)
    memory.map(second, list(reversed(handles)))
    left, right = (words(memory, at, 2, device) for at in (first, second))
    half = len(left) // 2
    busy(device)
    left.copy_(torch.arange(len(left), dtype=torch.int32, device=device))
    seen = right.clone()  # same stream: after the write
    assert torch.equal(seen[half:].cpu(), torch.arange(half, dtype=torch.int32))
    assert torch.equal(seen[:half].cpu(), torch.arange(half, 2 * half, dtype=torch.int32))
    right.zero_()
    assert not left.any()
    memory.unmap(first, 2)
    memory.unmap(second, 2)


def test_contents_stay_where_pages_are_mapped_beside_running_kernels(
    memory: Any, device: str
) -> None:
    page, rounds = memory.granularity, 20
    base = memory.reserve((rounds + 1) * page)
    memory.map(base, memory.create(1))
    kept = words(memory, base, 1, device)
    kept.copy_(torch.arange(len(kept), dtype=torch.int32, device=device))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for i in range(rounds):
        busy(device)
        wrong += (kept != torch.arange(len(kept), dtype=torch.int32, device=device)).sum()
        memory.map(base + (i + 1) * page, memory.create(1))
        words(memory, base + (i + 1) * page, 1, device).fill_(-i)
    assert wrong.item() == 0
    for i in range(rounds):
        assert (words(memory, base + (i + 1) * page, 1, device) == -i).all()
    memory.unmap(base, rounds + 1)


def test_pages_of_a_closed_slot_wait_for_the_step_that_reads_them(memory: Any, device: str) -> None:
    pages = 6
    arena = make_arena(memory, slots=3, pages=pages, budget=pages * memory.granularity)
    tokens = arena.layout.max_tokens
    keys, _ = layer_views(arena, 0, torch.int32, device)
    reader = arena.open(tokens)
    assert reader is not None
    assert arena.ensure(reader, tokens)
    keys[reader, :tokens] = torch.arange(tokens, dtype=torch.int32, device=device)[:, None, None]
    busy(device)
    read = keys[reader, :tokens].clone()  # step 1
    arena.close(reader, 1)
    assert arena.open(tokens) == reader  # its own pages may be had at once: no unmapping
    arena.close(reader, 1)
    first, other = arena.open(tokens), arena.open()
    assert (first, other is None) == (reader, False)
    arena.close(first, 1)
    assert not arena.ensure(other, tokens), "pages were taken from under a running step"
    assert torch.equal(read[:, 0, 0].cpu(), torch.arange(tokens, dtype=torch.int32))
    arena.retire(1)
    assert arena.ensure(other, tokens)
    keys[other, :tokens] = 7
    assert (keys[other, :tokens] == 7).all()
    check_arena(arena)
    arena.release()


@pytest.mark.parametrize("seed", range(3))
def test_patterns_survive_two_steps_in_flight(memory: Any, device: str, seed: int) -> None:
    """Sequences grow, end and start in pages that are short, and the device lags two steps."""
    rng = random.Random(seed)
    arena = make_arena(memory, slots=6, pages=8, budget=24 * memory.granularity)
    limit = arena.layout.max_tokens
    views = [view for layer in (0, 1) for view in layer_views(arena, layer, torch.int32, device)]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    live: dict[int, tuple[int, int]] = {}  # slot -> pattern, tokens
    flying: deque[tuple[int, Any]] = deque()
    stolen = closed = 0

    def pattern(start: int, begin: int, end: int) -> torch.Tensor:
        row = torch.arange(start + begin, start + end, dtype=torch.int32, device=device)
        return row[:, None, None]

    for step in range(1, 121):
        slot = arena.open(rng.randrange(limit)) if rng.random() < 0.5 else None
        if slot is not None:
            live[slot] = (step * 1_000_003, 0)
        busy(device)
        for slot, (start, tokens) in list(live.items()):
            more = min(limit, tokens + rng.randrange(1, limit // 4))
            if arena.ensure(slot, more):
                for i, view in enumerate(views):
                    view[slot, tokens:more] = pattern(start + i, tokens, more)
                live[slot] = (start, more)
            for i, view in enumerate(views):
                wrong += (view[slot, : live[slot][1]] != pattern(start + i, 0, live[slot][1])).sum()
        for slot in [s for s in live if rng.random() < 0.25]:
            arena.close(slot, step)
            del live[slot]
            closed += 1
        event = torch.cuda.Event() if device == "cuda" else None
        if event is not None:
            event.record()
        flying.append((step, event))
        if len(flying) > 2:
            done, passed = flying.popleft()
            if passed is not None:
                passed.synchronize()
            arena.retire(done)
        stolen = arena.usage().work["unmap"].calls
        check_arena(arena)
    assert wrong.item() == 0
    assert closed > 20
    assert stolen > 5, "no page ever moved between slots"
    if device == "cuda":
        torch.cuda.synchronize()
    arena.release()
