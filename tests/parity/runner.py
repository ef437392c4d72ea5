"""Builds the real engine around a model, as a worker does, and runs prompts through it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from batchrun.allocator.cuda import CudaMemory
from batchrun.engine.build import Assembly
from batchrun.engine.constraints import Constraints
from batchrun.engine.core import Completion, Request, SamplingParams
from batchrun.engine.core import Sequence as Row
from batchrun.engine.graphs import Recorded
from batchrun.engine.model.hook import HOOK, set_attention
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.pieces import Apart
from batchrun.engine.settings import Settings
from batchrun.engine.speculation.lookup import Lookup
from batchrun.engine.speculation.speculator import Speculator
from batchrun.engine.speculation.table import AnswerTable
from tests.allocator.invariants import check_arena
from tests.engine import invariants
from tests.engine.echo import Costs


class _OverFakeDriver(Assembly):
    """The CPU computes, and its memory is what a GPU's driver would give."""

    def _make_memory(self) -> tuple[CudaMemory, Callable[[], int]]:
        memory = CudaMemory(page_size=self.settings.page_size)
        return memory, lambda: memory.memory_info()[0]


@contextmanager
def rig(
    loaded: LoadedModel, *, lag: int = 0, draft: LoadedModel | None = None, **settings: Any
) -> Iterator[Assembly]:
    """An engine on the CPU; with a lag it is driven as on a device that computes by itself."""
    defaults: dict[str, Any] = {
        "max_num_batched_tokens": 256,
        "page_size": 4096,
        "attention": "sdpa",
    }
    defaults |= {"optimize": False}
    made = Settings("", "tiny", "", Path(), **{**defaults, **settings})
    fake = os.environ.get("BATCHRUN_TEST_MEMORY") == "fake-cuda"
    with (_OverFakeDriver if fake else Assembly)(loaded, made, draft=draft) as assembly:
        assembly.executor.lag = lag
        yield assembly


def run(
    rig: Assembly,
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
            row = completion.request.row
            assert row not in done, f"row {row} completed twice"
            done[row] = completion
        if check:
            invariants.check(rig.scheduler)
            check_arena(rig.arena)
    return [done[row] for row in range(len(prompts))]


def outputs(completions: Sequence[Completion]) -> list[list[int]]:
    return [list(c.token_ids) for c in completions]


class _Told(Lookup):
    def __init__(self, sequence: Row, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__(sequence)
        self._answer = answers.get(sequence.request.prompt_ids, [])

    def find(self, most: int) -> list[int]:
        super().find(most)
        begin = len(self._sequence.output_ids)
        coming = enumerate(self._answer[begin : begin + most], begin)
        return [t if (t + i) % 4 else t + 1 for i, t in coming]


def told(
    answers: dict[tuple[int, ...], list[int]],
    constraints: Constraints | None = None,
    *,
    overlap: bool = False,
) -> Speculator:
    """Proposes what comes, but for one token in four, and is believed; answers are by prompt."""
    return Speculator(
        *(1000, Costs(40), constraints, AnswerTable(bits=8), lambda s: _Told(s, answers)),
        overlap=overlap,
        rate=1.0,
    )


def generate(model: Any, prompt: Sequence[int], max_tokens: int, **kwargs: Any) -> list[int]:
    """What transformers' own `generate` continues the prompt with, eager attention, batch of 1."""
    import torch  # noqa: PLC0415

    set_attention(model, "eager")
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
        set_attention(model, HOOK)
    return got[0, len(prompt) :].tolist()


def spoiled(function: Callable[[Apart], torch.Tensor]) -> Recorded:
    """A recording that computes anew, in memory that is spoiled before."""
    output = torch.empty_like(function(lambda call: call()))

    def replay() -> None:
        output.fill_(torch.nan)
        output.copy_(function(lambda call: call()))

    return replay, output
