"""What is counted, against sums worked out by hand, and how close mapped stays to live."""

import random

import pytest
from memory_twins import PAGE, SCALE, open_memory, opened

from batchrun.allocator.accounting import Usage, UsageIntegral
from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.pages import Work
from batchrun.allocator.vmm import VirtualMemory
from tests.allocator.invariants import check_arena


def usage(*, maps: int = 0, **values: int) -> Usage:
    zero = dict.fromkeys(Usage.__dataclass_fields__, 0)
    works = ("map", Work(maps)), *((name, Work()) for name in ("unmap", "create", "destroy"))
    return Usage(**{**zero, **values, "work": dict(works)})


def test_usage_of_a_few_slots(make_arena) -> None:
    arena = make_arena(layers=2, layers_per_slab=1, max_tokens=64, num_slots=4, slack=10.0)
    first, second, third = arena.open(), arena.open(), arena.open()
    for slot, tokens in ((first, 5), (second, 33), (third, 16)):
        assert arena.ensure(slot, tokens)
    arena.close(third, step=0)
    now = arena.usage()
    assert now.reserved == 4 * 2 * 64 * 1024 * SCALE
    assert now.mapped == 2 * (2 + 9 + 4) * PAGE, "the closed slot still holds its pages"
    assert now.live == (5 + 33) * 2048 * SCALE
    assert now.static == 2 * 64 * 2048 * SCALE
    assert now.paged == (1 + 3) * 16 * 2048 * SCALE
    calls = {name: work.calls for name, work in now.work.items()}
    assert calls == {"map": 6, "unmap": 0, "create": 3, "destroy": 0}
    assert now.work["map"].seconds > 0
    assert now.work["create"].seconds > 0
    assert (now.work["unmap"].seconds, now.work["destroy"].seconds) == (0, 0)
    arena.retire(0)
    arena.trim()
    assert arena.usage().mapped == 2 * (2 + 9) * PAGE
    assert arena.usage().work["unmap"].seconds > 0
    assert arena.usage().work["destroy"].seconds > 0
    assert arena.usage().work["destroy"].calls == 1
    now = arena.usage()
    assert arena.work_seconds == pytest.approx(sum(work.seconds for work in now.work.values()))


def test_integral_weighs_by_time_and_keeps_peaks() -> None:
    integral = UsageIntegral()
    integral.add(usage(reserved=100, mapped=10, live=9, shared=3, static=80, paged=12, maps=1), 2.0)
    integral.add(usage(reserved=100, mapped=30, live=6, static=40, paged=7, maps=4), 0.5)
    assert integral.seconds == 2.5
    assert integral.as_dict() == {
        "kv_s": 2.5,
        "kv_reserved": 100,
        "kv_mapped": 30,
        "kv_live": 6,
        "kv_shared": 0,
        "kv_static": 40,
        "kv_paged": 7,
        "kv_reserved_s": 250.0,
        "kv_mapped_s": 35.0,
        "kv_live_s": 21.0,
        "kv_shared_s": 6.0,
        "kv_static_s": 180.0,
        "kv_paged_s": 27.5,
        "peak_kv_reserved": 100,
        "peak_kv_mapped": 30,
        "peak_kv_live": 9,
        "peak_kv_shared": 3,
        "peak_kv_static": 80,
        "peak_kv_paged": 12,
        "map_calls": 4,
        "unmap_calls": 0,
        "create_calls": 0,
        "destroy_calls": 0,
        "map_s": 0.0,
        "unmap_s": 0.0,
        "create_s": 0.0,
        "destroy_s": 0.0,
    }
    with pytest.raises(ValueError, match="backwards by 1"):
        integral.add(usage(), -1.0)


def churn(
    arena: KVArena, *, steps: int, seed: int, prompts: tuple[int, int], answers: int, chunk: int
) -> UsageIntegral:
    """A full batch of prompts of some length and answers of about one, refilled at each end.

    Returns the usage from a quarter of the way on, when lengths are mixed.
    """
    rng = random.Random(seed)
    integral = UsageIntegral()
    running: list[list[int]] = []  # slot, tokens computed, prompt, total
    for step in range(steps):
        while (slot := arena.open(prompt := rng.randint(*prompts))) is not None:
            running.append([slot, 0, prompt, prompt + 1 + int(rng.expovariate(1 / answers))])
        for sequence in running:
            slot, tokens, prompt, _ = sequence
            sequence[1] = min(tokens + chunk, prompt) if tokens < prompt else tokens + 1
            assert arena.ensure(slot, sequence[1])
        if step >= steps // 4:
            integral.add(arena.usage(), 1.0)
        for sequence in [s for s in running if s[1] == s[3]]:
            arena.close(sequence[0], step)
            running.remove(sequence)
        arena.retire(step)
    return integral


@pytest.mark.parametrize(("num_slots", "seed"), [(4, 0), (16, 1), (32, 2)])
def test_memory_is_real_under_churn(num_slots: int, seed: int) -> None:
    # SmolLM2-135M in float32: 46,080 bytes a token, 5.7 tokens in a page of 256 KiB.
    with opened(open_memory(256 << 10)) as memory:
        dim = 64 * memory.granularity // (256 << 10)
        layout = KVLayout((LayerKV(3, dim, dim),) * 30, 4, memory.granularity, 8192, 30)
        arena = KVArena(memory, layout, num_slots=num_slots)
        integral = churn(arena, steps=600, seed=seed, prompts=(10, 300), answers=150, chunk=64)
        check_arena(arena)
        seconds = integral.as_dict()
        assert seconds["kv_live_s"] >= 0.95 * seconds["kv_mapped_s"]
        assert seconds["kv_static_s"] > 20 * seconds["kv_mapped_s"]


@pytest.mark.parametrize("token_bytes", [224, 256])
def test_memory_is_real_at_1k_tokens_and_16_to_18_a_page(
    memory: VirtualMemory, token_bytes: int
) -> None:
    # Qwen3-0.6B and Llama-3-8B in bfloat16: 18.29 and 16 tokens in a page of 2 MiB.
    layout = KVLayout((LayerKV(SCALE, token_bytes // 8, token_bytes // 8),), 4, PAGE, 4096, 1)
    arena = KVArena(memory, layout, num_slots=48)
    integral = churn(arena, steps=900, seed=0, prompts=(300, 1500), answers=200, chunk=512)
    seconds = integral.as_dict()
    assert seconds["kv_live_s"] >= 0.96 * seconds["kv_mapped_s"]
    check_arena(arena)


def test_reclamation_deferred_saves_most_mapping_where_lengths_repeat(
    memory: VirtualMemory,
) -> None:
    layout = KVLayout((LayerKV(2, 64 * SCALE, 64 * SCALE),), 4, PAGE, 256, 1)
    arena = KVArena(memory, layout, num_slots=8)
    for step in range(0, 1000, 10):
        slots = [arena.open(100) for _ in range(8)]
        for slot in slots:
            assert arena.ensure(slot, 100)
        for slot in slots:
            arena.close(slot, step)
        arena.retire(step)
    assert arena.usage().work["map"].calls == 8, "800 sequences, and only the first eight mapped"
    arena.release()
