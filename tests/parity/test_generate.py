"""Token for token what `model.generate` gives, whatever the batching, chunking and preemption."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from batchrun.allocator.arena import KVArena
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import Request, SamplingParams, Segment
from batchrun.engine.graphs import Recorded
from batchrun.engine.model import gates
from batchrun.engine.model.hook import HOOK, set_attention
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.errors import ModelError
from tests.allocator.invariants import check_arena
from tests.pairs import part
from tests.parity.models import CONFIGS, build
from tests.parity.runner import generate, outputs, rig, run

MAX_TOKENS = 14
SHAPES = {
    "chunked": {"max_num_batched_tokens": 13},
    "one-at-a-time": {"max_num_seqs": 1},
    "seven-a-slab-per-layer": {"max_num_seqs": 7, "layers_per_slab": 1},
    "pipelined": {"lag": 1, "max_num_batched_tokens": 40, "max_num_seqs": 9},
}


@cache
def loaded(name: str) -> LoadedModel:
    return prepare(build(name))


@cache
def prompts(count: int = 24) -> list[list[int]]:
    rng = random.Random(5)
    return [
        [rng.randrange(3, 199) for _ in range(rng.choice([1, 2, 5, 12, 33, 60]))]
        for _ in range(count)
    ]


@cache
def wanted(name: str) -> list[list[int]]:
    return [generate(loaded(name).model, p, MAX_TOKENS) for p in prompts()]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_generate(name: str) -> None:
    with rig(loaded(name)) as r:
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
    assert outputs(done) == wanted(name)


@pytest.mark.parametrize(
    ("name", "shape"), part(4, [*CONFIGS], [*SHAPES], whole=["llama", "gemma2-softcap"])
)
def test_greedy_equals_generate_in_steps_of_any_shape(name: str, shape: str) -> None:
    with rig(loaded(name), **SHAPES[shape]) as r:  # type: ignore[arg-type]
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
    assert outputs(done) == wanted(name)


@pytest.fixture
def greedy_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admit whatever fits now, so that rows are preempted all the time."""
    monkeypatch.setattr(KVArena, "has_room", lambda *_: True)


def bytes_per_token(model: LoadedModel) -> int:
    return sum(s.kv_heads * (s.k_dim + s.v_dim) for s in model.layers) * 4


@pytest.mark.usefixtures("greedy_admission")
@pytest.mark.parametrize(("name", "lag"), part(2, [*CONFIGS], [0, 1]))
def test_greedy_equals_generate_when_memory_is_short(name: str, lag: int) -> None:
    model = loaded(name)
    with rig(model, kv_budget=bytes_per_token(model) * 170, lag=lag) as r:
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
        assert r.scheduler.num_preemptions > 0
        assert r.engine.stats.recomputed_tokens > 0
    assert outputs(done) == wanted(name)


@cache
def families() -> list[list[int]]:
    """Prompts of which many begin alike, on several levels, in no order."""
    rng = random.Random(6)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, 199) for _ in range(count)]

    system = words(21)
    documents = [words(count) for count in (19, 40, 3)]
    rows = [system + rng.choice(documents) + words(rng.choice([1, 4, 17])) for _ in range(20)]
    return [*rows, *prompts(4), rows[0], rows[0], system]


@cache
def wanted_of_families(name: str) -> list[list[int]]:
    return [generate(loaded(name).model, p, MAX_TOKENS) for p in families()]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, {"lag": 1, "short": True}) for name in CONFIGS),
        ("llama", {"max_num_batched_tokens": 24}),
    ],
)
def test_rows_that_begin_alike_share_it_and_equal_generate(
    name: str, shape: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    model, shape = loaded(name), dict(shape)
    if shape.pop("short", False):
        request.getfixturevalue("greedy_admission")
        shape["kv_budget"] = bytes_per_token(model) * 190
    with rig(model, **shape) as r:
        done = run(r, families(), SamplingParams(max_tokens=MAX_TOKENS))
        assert r.scheduler.stays.num_shared_tokens > 400
        assert ("kv_budget" in shape) == (r.scheduler.num_preemptions > 0)
    assert outputs(done) == wanted_of_families(name)


def rerun(function: Callable[[], torch.Tensor]) -> Recorded:
    """A recorder without CUDA: a replay computes the function again, into the same tensor."""
    logits = function().clone()

    def replay() -> None:
        logits.copy_(function())

    return replay, logits


class Rereading(SDPA):
    """SDPA under `rerun`, which freezes nothing."""

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        super().plan(segments)


@pytest.mark.parametrize("lag", [0, 1])
def test_recorded_steps_equal_generate(lag: int) -> None:
    model, sizes = loaded("llama"), [4, 9]
    with rig(model, lag=lag, max_num_seqs=10) as r:
        scratch = r.arena.open(1)
        assert scratch is not None
        assert r.arena.ensure(scratch, 1)
        r.executor.backend = Rereading()
        r.executor.capture(sizes, scratch, rerun)
        r.scheduler.max_num_seqs = 9
        graphs, replayed = r.executor.graphs, Counter[int]()
        assert graphs is not None
        replay = graphs.replay

        def counting(size: int) -> torch.Tensor:
            replayed[size] += 1
            return replay(size)

        graphs.replay = counting  # type: ignore[method-assign]
        done = run(r, prompts(), SamplingParams(max_tokens=MAX_TOKENS))
        assert set(replayed) == set(sizes)
    assert outputs(done) == wanted("llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_canary_passes(name: str) -> None:
    with rig(loaded(name)) as r:
        assert gates.verify(loaded(name), r.executor, r.arena, 64) < 1e-4
        check_arena(r.arena)
        assert r.arena.num_open == 0


SAMPLED = SamplingParams(max_tokens=12, temperature=1.1, top_p=0.95, top_k=80)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "mixtral-moe"])
def test_samples_are_the_same_for_any_batch_order_and_chunk(name: str) -> None:
    model = loaded(name)
    with rig(model) as r:
        want = outputs(run(r, prompts(), SAMPLED, seed=11))
    assert len({tuple(w) for w in want}) > 20
    backwards = list(reversed(range(len(prompts()))))
    for kwargs in (*SHAPES.values(), {"kv_budget": 60 * 4096}, {"kv_budget": 60 * 4096, "lag": 1}):
        with rig(model, **kwargs) as r:  # type: ignore[arg-type]
            assert outputs(run(r, prompts(), SAMPLED, seed=11, order=backwards)) == want
    with rig(model) as r:
        assert outputs(run(r, prompts(), SAMPLED, seed=12)) != want


@pytest.mark.usefixtures("greedy_admission")
def test_penalties_are_the_same_pipelined_and_preempted() -> None:
    model = loaded("llama")
    each = [
        SamplingParams(
            max_tokens=12,
            temperature=[0.0, 1.0][i % 2],
            repetition_penalty=[1.0, 1.3][i % 3 > 0],
            presence_penalty=0.3 * (i % 3),
            frequency_penalty=0.2 * (i % 4),
            min_tokens=i % 5,
            stop_token_ids=tuple(range(40)),
        )
        for i in range(len(prompts()))
    ]
    with rig(model, max_num_seqs=1) as r:
        want = outputs(run(r, prompts(), each, seed=4))
    assert len({len(w) for w in want}) > 3
    for lag in (0, 1):
        with rig(model, lag=lag, kv_budget=45 * 4096, max_num_batched_tokens=50) as r:
            assert outputs(run(r, prompts(), each, seed=4)) == want
            assert r.scheduler.num_preemptions > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_another_engine_goes_on_in_mid_generation(lag: int) -> None:
    model, params = loaded("llama"), SamplingParams(max_tokens=12, temperature=1.0, top_p=0.95)
    with rig(model) as r:
        want = outputs(run(r, prompts(), params, seed=11))
    done: dict[int, list[int]] = {}
    begun: dict[int, tuple[int, ...]] = {}
    for steps in (3, 5, 8, 1000):  # lives of an engine
        with rig(model, max_num_seqs=9, lag=lag) as r:
            for row, prompt in enumerate(prompts()):
                if row not in done:
                    tokens = begun.get(row, ())
                    r.engine.add(Request(row, 0, tuple(prompt), params, 11, tokens))
            for _ in range(steps):
                for completion in r.engine.step() if r.engine.has_work else ():
                    done[completion.request.row] = list(completion.token_ids)
            begun = {left.row: left.generated_ids for left in r.engine.partials()}
            assert begun or not r.engine.has_work
    assert [done[row] for row in range(len(prompts()))] == want


@pytest.mark.parametrize("lag", [0, 1])
def test_log_probabilities_are_those_of_a_forward(lag: int) -> None:
    """Also of tokens that an earlier engine sampled, and of preempted sequences."""
    model, done, begun = loaded("llama"), {}, {}
    params = SamplingParams(max_tokens=20, temperature=1.3, top_k=50, scored=True)
    preemptions = 0
    for steps in (4, 9, 1000):
        with rig(model, lag=lag, kv_budget=45 * 4096, max_num_batched_tokens=50) as r:
            for row, prompt in enumerate(prompts()):
                if row not in done:
                    r.engine.add(Request(row, 0, tuple(prompt), params, 3, *begun.get(row, ())))
            for _ in range(steps):
                for completion in r.engine.step() if r.engine.has_work else ():
                    done[completion.request.row] = completion
            left = r.engine.partials()
            begun = {each.row: (each.generated_ids, each.generated_logprob) for each in left}
            preemptions += r.scheduler.num_preemptions
    assert preemptions > 0
    for row, prompt in enumerate(prompts()):
        ids = torch.tensor([[*prompt, *done[row].token_ids]])
        set_attention(model.model, "eager")
        with torch.inference_mode():
            scores = model.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        set_attention(model.model, HOOK)
        want = scores.gather(1, ids[0, len(prompt) :, None]).mean()
        assert abs(done[row].logprob / len(done[row].token_ids) - float(want)) < 1e-4


def test_end_tokens_min_tokens_and_ignore_eos() -> None:
    model = loaded("llama")
    prompt = prompts()[3]
    free = generate(model.model, prompt, 10)
    stop = free[4]
    at = free.index(stop) + 1
    cases = {
        SamplingParams(max_tokens=10, stop_token_ids=(stop,)): free[:at],
        SamplingParams(max_tokens=10, stop_token_ids=(stop,), ignore_eos=True): free[:at],
        SamplingParams(max_tokens=10): free,
    }
    with rig(model) as r:
        for params, want in cases.items():
            assert outputs(run(r, [prompt], params)) == [want]
        held = outputs(
            run(r, [prompt], SamplingParams(max_tokens=10, min_tokens=8, stop_token_ids=(stop,)))
        )
    want = generate(model.model, prompt, 10, eos_token_id=stop, min_new_tokens=8)
    assert held == [want]
    assert stop not in want[:8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_canary_knows_what_rounding_does(dtype: torch.dtype) -> None:
    model = build("llama")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    half = prepare(model.to(dtype))
    found = gates.reference(half)
    assert 0 < found.rounding < 0.1
    assert all(p.dtype == dtype for p in half.model.parameters())
    for name, parameter in half.model.named_parameters():
        assert torch.equal(parameter, weights[name].to(dtype)), name
    with rig(half) as r:
        assert gates.verify(half, r.executor, r.arena, 64, found) < 0.06
        # As much rounding as no limit for wrong attention may grow with.
        noisy = gates.Reference(found.logits, rounding=5.0)
        wrong = tuple(logits.flip(-1) for logits in found.logits)
        assert gates.verify(half, r.executor, r.arena, 64, noisy) < 0.06
        with pytest.raises(ModelError, match="is refused"):
            gates.verify(half, r.executor, r.arena, 64, gates.Reference(wrong, 5.0))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_ignore_end_tokens_are_generates_with_as_many_new_ones(
    num_beams: int, lag: int
) -> None:
    model = loaded("llama")
    tokens = Counter(token for row in wanted("llama") for token in row)
    ends = [token for token, _ in tokens.most_common(12)]
    params = SamplingParams(max_tokens=10, ignore_eos=True, num_beams=num_beams)
    ask = {"eos_token_id": ends, "min_new_tokens": 10, "num_beams": num_beams}
    with rig(replace(model, eos_ids=frozenset(ends)), lag=lag) as r:
        got = outputs(run(r, prompts(8), params))
    assert got == [generate(model.model, prompt, 10, **ask) for prompt in prompts(8)]
    assert not set(ends) & {token for row in got for token in row}
