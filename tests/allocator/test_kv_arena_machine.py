"""Random operations on an arena whose every live byte is written and verified."""

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_twins import DEVICE, PAGE, SCALE, examples, open_memory, opened

from allocator.arena import KVArena
from allocator.layout import KVLayout, LayerKV
from allocator.tensor import layer_views, strided_view
from allocator.vmm import VirtualMemory

MAX_TOKENS = 48
LAYOUTS = [
    # 400, 1000 and 1028 bytes a token where pages are 4 KiB: they hold 10.24, 4.1 and 3.98 tokens.
    KVLayout((LayerKV(SCALE, 25, 25),) * 2, 4, PAGE, MAX_TOKENS, 2),
    KVLayout((LayerKV(5 * SCALE, 60, 40), LayerKV(SCALE, 514, 0)), 2, PAGE, MAX_TOKENS, 1),
    KVLayout(
        (LayerKV(2 * SCALE, 31, 33), LayerKV(3 * SCALE, 64, 64), LayerKV(SCALE, 7, 1)),
        *(4, PAGE, MAX_TOKENS, 2),
    ),
]


@dataclass
class Occupant:
    """What a slot must hold: each token's words are made from `name` and its position."""

    name: int
    tokens: int = 0


class ArenaMachine(RuleBasedStateMachine):
    @initialize(
        layout=st.sampled_from(LAYOUTS),
        num_slots=st.integers(1, 4),
        budget=st.one_of(st.none(), st.integers(2, 40)),
        slack=st.sampled_from([0.0, 0.05, 1.0]),
    )
    def create(self, layout: KVLayout, num_slots: int, budget: int | None, slack: float) -> None:
        self.memory = open_memory()
        self.layout, self.budget, self.ceiling = layout, budget, budget
        self.arena = KVArena(
            self.memory,
            layout,
            num_slots=num_slots,
            budget=None if budget is None else lambda: self.budget * PAGE,
            slack=slack,
        )
        self.open_slots: dict[int, Occupant] = {}
        self.closing: dict[int, tuple[int, Occupant]] = {}  # closed, its step not yet retired
        self.fences = dict.fromkeys(range(num_slots), -1)
        self.names = self.step = 0
        self.retired = -1

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.release()
            self.arena.check()
            assert (self.memory.ledger.reservations, self.memory.ledger.mapped_at) == ({}, {})
            self.memory.close()

    def words(self, group: int, slot: int, begin: int, end: int) -> torch.Tensor:
        """The tokens [begin, end) of a slab, as [tokens, words of 32 bits]."""
        slab, size = self.layout.slab_size(group), self.layout.group_bytes_per_token(group)
        return strided_view(
            self.arena.address(group) + slot * slab,
            slab,
            (end - begin, size // 4),
            (size // 4, 1),
            torch.int32,
            offset=begin * size // 4,
            device=DEVICE,
        )

    def pattern(self, group: int, name: int, begin: int, end: int) -> torch.Tensor:
        """What each word of the tokens [begin, end) must be, as [tokens, 1]."""
        tokens = torch.arange(begin, end, dtype=torch.int32, device=DEVICE)[:, None]
        return (name * self.layout.num_groups + group) * MAX_TOKENS + tokens

    def write(self, slot: int, name: int, begin: int, end: int) -> None:
        for group in range(self.layout.num_groups if begin < end else 0):
            self.words(group, slot, begin, end).copy_(self.pattern(group, name, begin, end))

    def verify(self, slot: int, occupant: Occupant) -> None:
        for group in range(self.layout.num_groups if occupant.tokens else 0):
            words = self.words(group, slot, 0, occupant.tokens)
            wanted = self.pattern(group, occupant.name, 0, occupant.tokens)
            assert torch.equal(words, wanted.expand_as(words)), f"slot {slot}, group {group}"

    @rule(expected=st.integers(0, MAX_TOKENS))
    def open(self, expected: int) -> None:
        before = self.arena.usage()
        slot = self.arena.open(expected)
        assert (slot is None) == (len(self.open_slots) == self.arena.num_slots)
        if slot is not None:
            assert slot not in self.open_slots
            self.open_slots[slot] = Occupant(self.names)
            self.closing.pop(slot, None)
            self.names += 1
        after = self.arena.usage()
        assert (after.map_calls, after.mapped) == (before.map_calls, before.mapped)

    @precondition(lambda self: self.open_slots)
    @rule(data=st.data(), tokens=st.integers(0, MAX_TOKENS))
    def ensure(self, data: st.DataObject, tokens: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open_slots)))
        occupant, before = self.open_slots[slot], self.arena.usage()
        if self.arena.ensure(slot, tokens):
            self.write(slot, occupant.name, occupant.tokens, tokens)
            occupant.tokens = tokens
        else:
            assert self.arena.usage().live == before.live
            self.check_that_no_page_was_to_be_had(slot, tokens)

    def check_that_no_page_was_to_be_had(self, slot: int, tokens: int) -> None:
        assert self.budget is not None
        wanted = self.layout.pages_for(tokens)
        held = 0
        for state in self.arena._slots:
            held += state.num_claimed
            if state.surplus and state.fence > self.retired:
                held += state.surplus
        mine = self.arena._slots[slot]
        held += sum(max(0, n - claim) for n, claim in zip(wanted, mine.claimed, strict=True))
        if mine.fence > self.retired:  # counted twice: surplus that the slot could have used itself
            kept = zip(wanted, mine.claimed, mine.tables, strict=True)
            held -= sum(min(max(0, n - c), len(t) - c) for n, c, t in kept)
        assert held > self.budget, f"{held} pages wanted in all, of {self.budget}"

    @precondition(lambda self: self.open_slots)
    @rule(data=st.data(), ago=st.integers(0, 2))
    def close(self, data: st.DataObject, ago: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open_slots)))
        step = max(self.step - ago, 0)
        self.arena.close(slot, step)
        occupant = self.open_slots.pop(slot)
        self.fences[slot] = max(self.fences[slot], step)
        if self.fences[slot] > self.retired:
            self.closing[slot] = (self.fences[slot], occupant)

    @rule()
    def next_step(self) -> None:
        self.step += 1

    @rule(behind=st.integers(0, 3))
    def retire(self, behind: int) -> None:
        self.arena.retire(self.step - behind)
        self.retired = max(self.retired, self.step - behind)
        if self.budget is not None:
            needed = sum(
                state.num_pages if state.fence > self.retired else state.num_claimed
                for state in self.arena._slots
            )
            self.ceiling = max(self.budget, needed)
        self.closing = {s: c for s, c in self.closing.items() if c[0] > self.retired}

    @precondition(lambda self: self.budget is not None)
    @rule(room=st.integers(-8, 16), late=st.booleans())
    def another_process_takes_or_gives_memory(self, room: int, late: bool) -> None:
        created = self.arena.pool.created
        self.budget = max(0, created + room)
        self.ceiling = max(self.budget, created)
        if not late:
            self.retire(0)

    @rule()
    def trim(self) -> None:
        self.arena.trim()
        assert self.arena.pool.free == 0

    @rule(tokens=st.integers(0, MAX_TOKENS + 1))
    def can_fit(self, tokens: int) -> None:
        pages = sum(
            -(-tokens * self.layout.group_bytes_per_token(g) // PAGE)
            for g in range(self.layout.num_groups)
        )
        fits = tokens <= MAX_TOKENS and (self.budget is None or pages <= self.budget)
        assert self.arena.can_fit(tokens) == fits

    @invariant()
    def everything_agrees(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check()
        for slot, occupant in self.open_slots.items():
            assert self.arena.live_tokens(slot) == occupant.tokens
            self.verify(slot, occupant)
        for slot, (_, occupant) in self.closing.items():
            self.verify(slot, occupant)  # a step that is running may still read it
        usage, created = self.arena.usage(), self.arena.pool.created
        assert usage.mapped == created * PAGE == len(self.memory.ledger.mapped_at) * PAGE
        assert self.ceiling is None or created <= self.ceiling
        lengths = [occupant.tokens for occupant in self.open_slots.values()]
        assert usage.live == sum(lengths) * self.layout.bytes_per_token
        assert usage.paged == sum(-(-n // 16) * 16 for n in lengths) * self.layout.bytes_per_token


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(
    deadline=None, max_examples=examples(120), stateful_step_count=50
)


@pytest.mark.parametrize("seed", range(6))
def test_tensors_keep_every_tokens_pattern_under_churn(seed: int) -> None:
    """A batch of growing sequences, as an engine writes them: through torch, layer by layer."""
    with opened(open_memory()) as memory:
        churn_tensors(memory, random.Random(seed))


def churn_tensors(memory: VirtualMemory, rng: random.Random) -> None:
    layers = tuple(LayerKV(rng.randint(1, 3) * SCALE, rng.choice([8, 20]), 16) for _ in range(4))
    layout = KVLayout(layers, 4, PAGE, 200, rng.choice([1, 2, 4]))
    arena = KVArena(memory, layout, num_slots=6, budget=60 * PAGE)
    views = [layer_views(arena, layer, torch.float32, DEVICE) for layer in range(4)]

    def patterns(name: int, layer: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = layers[layer]
        tokens = torch.arange(begin, end, dtype=torch.float32, device=DEVICE)[:, None, None]
        k = tokens + 1000.0 * name + 0.25 * layer
        heads = torch.arange(shape.kv_heads, dtype=torch.float32, device=DEVICE)[None, :, None] / 16
        return (
            (k + heads).expand(-1, -1, shape.k_dim),
            (-k - heads).expand(-1, -1, shape.v_dim),
        )

    def verify(slot: int, name: int, tokens: int) -> None:
        for layer, (k, v) in enumerate(views):
            k_wanted, v_wanted = patterns(name, layer, 0, tokens)
            assert torch.equal(k[slot, :tokens], k_wanted)
            assert torch.equal(v[slot, :tokens], v_wanted)

    running: dict[int, tuple[int, int]] = {}
    preempted = 0
    for step in range(250):
        slot = arena.open(rng.randint(0, 100))
        if slot is not None:
            running[slot] = (step, 0)
        for slot in list(running):
            if slot not in running:  # preempted for one before it
                continue
            name, tokens = running[slot]
            end = min(200, tokens + rng.choice([1, 1, 1, 17, 40]))
            while not arena.ensure(slot, end):
                victim = max(running, key=lambda s: running[s][0])
                verify(victim, *running.pop(victim))
                arena.close(victim, step - 1)
                preempted += 1
                if victim == slot:
                    break
            if slot not in running:
                continue
            positions = torch.arange(tokens, end, device=DEVICE)
            slots = torch.full_like(positions, slot)
            for layer, (k, v) in enumerate(views):
                k_new, v_new = patterns(name, layer, tokens, end)
                k[slots, positions] = k_new
                v[slots, positions] = v_new
            running[slot] = (name, end)
        for slot in [s for s, (_, n) in running.items() if n == 200 or rng.random() < 0.05]:
            verify(slot, *running.pop(slot))
            arena.close(slot, step)
        for slot, (name, tokens) in running.items():
            verify(slot, name, tokens)
        arena.retire(step)
        arena.check()
    assert preempted > 5
    assert arena.usage().unmap_calls > 5
    arena.release()
