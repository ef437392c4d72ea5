"""Tokens and their log-probabilities are the same bits, however an engine puts rows together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from batchrun.engine import attention
from batchrun.engine.attention import Geometry, Upload, triton_attention
from batchrun.engine.attention.triton_attention import Blocks, TritonAttention
from batchrun.engine.build import Assembly
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model.fused import fuse_norms, merge_projections
from batchrun.engine.model.layers import logits_of
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.model.rowwise import make_rowwise
from batchrun.engine.settings import Settings
from batchrun.engine.speculation.speculator import Speculator
from tests.parity import models
from tests.parity.runner import told

RNG = random.Random(3)
COMMON = [RNG.randrange(3, 199) for _ in range(20)]
PROMPTS = [
    [*COMMON[:begin], *(RNG.randrange(3, 199) for _ in range(own))]
    for begin, own in ((0, 1), (20, 5), (20, 14), (0, 33), (12, 3))
]


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, geometry: Geometry, upload: Upload, log: Any) -> TritonAttention:
        return TritonAttention(geometry, upload, programs=12)

    monkeypatch.setattr(attention, "create", create)
    monkeypatch.setattr(triton_attention, "PART", 16)
    monkeypatch.setattr(triton_attention, "blocks_for", lambda *_: Blocks(32, 16, 4, 1))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    made = prepare(models.build("mistral-window"))
    fuse_norms(made.model, [])
    merge_projections(made.model, lambda: logits_of(made.model), [])
    make_rowwise(made.model)
    return made


def answers(
    loaded: LoadedModel,
    cache: Path,
    rows: list[int],
    proposer: Speculator | None = None,
    **settings: Any,
) -> dict[int, tuple[Any, ...]]:
    """Of each row: its tokens, and their log-probabilities."""
    chosen = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "optimize": False} | settings
    done = {}
    with Assembly(loaded, Settings("", "m", "m", cache, drafts=False, **chosen)) as made:
        made.scheduler.stays.proposer = proposer
        for row in rows:
            params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=1.0, logprobs=1)
            made.engine.add(Request(row, 0, tuple(PROMPTS[row]), params, 7))
        while made.engine.has_work:
            for each in made.engine.step():
                assert each.error is None
                done[each.request.row] = tuple(each.token_ids), tuple(each.logprobs)
        assert bool(made.engine.stats.accepted_tokens) == (proposer is not None)
    return done


def test_answers_do_not_depend_on_the_batch(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = list(range(len(PROMPTS)))
    want = answers(loaded, tmp_path, rows)
    assert len(want) == len(rows)
    assert answers(loaded, tmp_path, rows[::-1], max_num_batched_tokens=9) == want
    assert answers(loaded, tmp_path, rows[1:3], max_num_seqs=1) == {r: want[r] for r in rows[1:3]}
    assert answers(loaded, tmp_path, rows, share_prefixes=False, max_num_seqs=2) == want
    of = {tuple(PROMPTS[row]): list(tokens) for row, (tokens, _) in want.items()}
    assert answers(loaded, tmp_path, rows, told(of)) == want
