"""Random operations on an arena whose every live byte is written and verified."""

import random

import pytest
import torch
from arena_model import LAYOUTS, MAX_TOKENS, ArenaModel
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_twins import DEVICE, PAGE, SCALE, examples, open_memory, opened

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views
from batchrun.allocator.vmm import VirtualMemory
from tests.allocator.invariants import check_arena

TOKENS = st.integers(0, MAX_TOKENS)


class ArenaMachine(RuleBasedStateMachine):
    @initialize(
        layout=st.sampled_from(LAYOUTS),
        num_slots=st.integers(1, 6),
        budget=st.one_of(st.none(), st.integers(2, 40)),
        slack=st.sampled_from([0.0, 0.05, 1.0]),
    )
    def create(self, layout: KVLayout, num_slots: int, budget: int | None, slack: float) -> None:
        self.model = ArenaModel(layout, num_slots, budget, slack)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.finish()

    def draw_open(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.open_slots)))

    @rule(expected=TOKENS)
    def open(self, expected: int) -> None:
        self.model.open(expected)

    @precondition(lambda self: {**self.model.open_slots, **self.model.kept, **self.model.left})
    @rule(data=st.data(), tokens=TOKENS, expected=TOKENS)
    def share(self, data: st.DataObject, tokens: int, expected: int) -> None:
        model = self.model
        sources = sorted({**model.open_slots, **model.kept, **model.left})
        model.share(data.draw(st.sampled_from(sources)), tokens, expected)

    @precondition(lambda self: self.model.open_slots)
    @rule(data=st.data(), tokens=TOKENS)
    def ensure(self, data: st.DataObject, tokens: int) -> None:
        self.model.ensure(self.draw_open(data), tokens)

    @precondition(lambda self: self.model.open_slots)
    @rule(data=st.data(), late=st.booleans(), keep=st.one_of(st.just(0), TOKENS))
    def close(self, data: st.DataObject, late: bool, keep: int) -> None:
        self.model.close(self.draw_open(data), keep, late=late)

    @precondition(lambda self: self.model.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.model.drop(data.draw(st.sampled_from(sorted(self.model.kept))))

    @rule()
    def launch(self) -> None:
        self.model.launch()

    @precondition(lambda self: self.model.running)
    @rule()
    def execute(self) -> None:
        self.model.execute()

    @rule(behind=st.integers(0, 3))
    def retire(self, behind: int) -> None:
        self.model.retire(behind)

    @precondition(lambda self: self.model.budget is not None)
    @rule(room=st.integers(-8, 16), late=st.booleans())
    def another_process_takes_or_gives_memory(self, room: int, late: bool) -> None:
        self.model.set_budget(room)
        if not late:
            self.model.retire(0)

    @rule()
    def trim(self) -> None:
        self.model.trim()

    @rule(tokens=TOKENS)
    def run_alone(self, tokens: int) -> None:
        self.model.run_alone(tokens)

    @rule(tokens=st.integers(0, MAX_TOKENS + 1))
    def can_fit(self, tokens: int) -> None:
        layout, budget = self.model.layout, self.model.budget
        sizes = (layout.group_bytes_per_token(g) for g in range(layout.num_groups))
        pages = sum(-(-tokens * size // PAGE) for size in sizes)
        fits = tokens <= MAX_TOKENS and (budget is None or pages <= budget)
        assert self.model.arena.can_fit(tokens) == fits

    @invariant()
    def everything_agrees(self) -> None:
        if hasattr(self, "model"):
            self.model.check()


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
        check_arena(arena)
    assert preempted > 5
    assert arena.usage().work["unmap"].calls > 5
    arena.release()
