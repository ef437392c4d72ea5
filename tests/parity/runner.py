"""Builds the real engine around a model, as a worker does, and runs prompts through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from allocator.arena import KVArena
from allocator.host import HostMemory
from allocator.layout import KVLayout, LayerKV
from allocator.tensor import layer_views
from batchrun.engine import attention
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.engine import Completion, Engine
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.model import LoadedModel
from batchrun.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Rig:
    engine: Engine
    arena: KVArena
    scheduler: Scheduler
    executor: TorchExecutor


@contextmanager
def rig(
    loaded: LoadedModel,
    *,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 256,
    page_size: int = 4096,
    kv_budget: int | None = None,
    layers_per_slab: int | None = None,
) -> Iterator[Rig]:
    memory = HostMemory(page_size)
    layout = KVLayout(
        tuple(LayerKV(s.kv_heads, s.k_dim, s.v_dim) for s in loaded.layers),
        loaded.dtype.itemsize,
        page_size,
        loaded.max_model_len,
        layers_per_slab or len(loaded.layers),
    )
    arena = KVArena(memory, layout, num_slots=max_num_seqs, budget=kv_budget)
    try:
        views = [layer_views(arena, i, loaded.dtype) for i in range(len(loaded.layers))]
        executor = TorchExecutor(loaded, views, attention.create("sdpa"))
        scheduler = Scheduler(
            arena,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=loaded.max_model_len,
        )
        engine = Engine(executor, scheduler, loaded.tokenizer, loaded.eos_ids)
        yield Rig(engine, arena, scheduler, executor)
    finally:
        arena.release()
        memory.close()


def run(
    rig: Rig,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    seed: int = 0,
    order: Sequence[int] | None = None,
    check: bool = True,
) -> list[Completion]:
    """Completions of the prompts, in their order; invariants are checked after each step."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    for row in order or range(len(prompts)):
        rig.engine.add(Request(row, 0, tuple(prompts[row]), each[row], seed))
    done: dict[int, Completion] = {}
    while rig.engine.has_work:
        for completion in rig.engine.step():
            row = completion.sequence.request.row
            assert row not in done, f"row {row} completed twice"
            done[row] = completion
        if check:
            rig.scheduler.check()
            rig.arena.check()
    return [done[row] for row in range(len(prompts))]


def outputs(completions: Sequence[Completion]) -> list[list[int]]:
    return [c.sequence.output_ids for c in completions]


def generate(model: Any, prompt: Sequence[int], max_tokens: int, **kwargs: Any) -> list[int]:
    """What transformers' own `generate` continues the prompt with, eager attention, batch of 1."""
    import torch  # noqa: PLC0415

    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([list(prompt)])
        got = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
            **kwargs,
        )
    finally:
        model.set_attn_implementation("batchrun")
    return got[0, len(prompt) :].tolist()
