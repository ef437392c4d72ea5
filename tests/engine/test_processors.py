"""Logits processors: what the sampler calls, when, and that a new one is a class in its list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from batchrun.engine.core import SamplingParams
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.logits import LogitsConfig, processors
from batchrun.engine.processors import LogitsProcessor, LogitsRow
from batchrun.engine.speculation.speculator import Speculator
from tests.engine.echo import Costs
from tests.parity.runner import outputs, rig, run
from tests.parity.test_generate import loaded, prompts


class Parity(LogitsProcessor):
    """Tokens of one sequence are even and odd in turns: what it may choose depends on its last."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held: dict[int, list[int]] = {}  # request -> the output that was accepted

    def prepare(self, rows: Sequence[LogitsRow]) -> bool:
        self.calls.append("prepare")
        self._last = torch.tensor([row.ids_so_far(1)[0] % 2 for row in rows])
        for row in rows:
            if not row.num_drafts:  # what was accepted and not taken back is what there is
                held = self.held.setdefault(row.request.row, [])
                assert held == row.output_ids[: row.num_generated]
        return True

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> torch.Tensor:
        self.calls.append("apply")
        same = torch.arange(logits.shape[1])[None] % 2 == self._last[:, None]
        return logits.masked_fill(same, -torch.inf)

    def accept(self, tokens: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        self.calls.append("accept")
        for row, token in zip(rows, tokens.tolist(), strict=True):
            self.held[row.request.row].append(token)

    def rollback(self, row: LogitsRow, count: int) -> None:
        self.calls.append("rollback")
        del self.held[row.request.row][-count:]


def added(executor: TorchExecutor) -> Parity:
    made = Parity()
    executor.sampler.processors.append(made)
    return made


@pytest.mark.parametrize("params", [{}, {"temperature": 0.9, "scored": True}, {"top_k": 3}])
def test_a_new_processor_is_one_more_in_the_list(params: dict[str, Any]) -> None:
    asked = SamplingParams(max_tokens=12, ignore_eos=True, **params)
    with rig(loaded("llama")) as r:
        made = added(r.executor)
        found = outputs(run(r, prompts(), asked))
        steps = len(made.calls) // 3
        assert made.calls == ["prepare", "apply", "accept"] * steps
    for prompt, output in zip(prompts(), found, strict=True):
        ids = [prompt[-1], *output]
        assert all(a % 2 != b % 2 for a, b in pairwise(ids))


def test_tokens_behind_wrong_draft_tokens_are_taken_back() -> None:
    asked = SamplingParams(max_tokens=40, ignore_eos=True)
    few = [prompt * 3 for prompt in prompts()[:4]]

    def tokens(*, drafts: bool) -> tuple[list[list[int]], list[str]]:
        with rig(loaded("llama")) as r:
            if drafts:
                r.scheduler.stays.proposer = Speculator(64, Costs(64))
            made = added(r.executor)
            found = outputs(run(r, few, asked))
            assert bool(r.engine.stats.accepted_tokens) == drafts
            return found, made.calls

    alone, calls = tokens(drafts=False)
    assert "rollback" not in calls
    guessed, calls = tokens(drafts=True)
    assert "rollback" in calls
    assert guessed == alone


def test_the_order_is_that_of_transformers() -> None:
    config = LogitsConfig(
        eos_ids=(1,),
        sequence_bias={(3,): 1.0},
        bad_words=((4,),),
        no_repeat_ngram_size=2,
        forced_bos=5,
        forced_eos=(1,),
        remove_invalid_values=True,
        decay=(2, 1.1),
        suppress=(6,),
        renormalize=True,
    )
    names = [type(p).__name__ for p in processors(config, (1,), torch.tensor, 4)]
    assert names == [
        *("SequenceBias", "Penalties", "EndTokens", "BadWords", "NoRepeatNgram"),
        *("ForcedTokens", "InvalidValues", "Decay", "Suppressed", "Renormalized"),
    ]
    always = [type(p).__name__ for p in processors(LogitsConfig(), (), torch.tensor, 4)]
    assert always == ["Penalties", "EndTokens"]
