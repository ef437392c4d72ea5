"""The right tokens on each device, for each attention backend, in float32 and in bfloat16.

A wrong kernel gives other logits at once. Rounding gives a near tie the other way, after which two
greedy texts have nothing in common: so each token is judged where it was chosen, by the model's
own float32 logits after the very same tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf

from batchrun.engine import attention
from batchrun.engine.attention import Geometry
from batchrun.engine.build import Assembly
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.engine.settings import Settings
from tests.allocator.invariants import check_arena
from tests.gpu.conftest import CUDA
from tests.parity.models import CONFIGS

MAX_TOKENS = 12
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}  # of the largest logit
_WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}


def wide(name: str) -> tf.PretrainedConfig:
    """A config of the parity tests with heads of 128, which every kernel library has."""
    config = copy.deepcopy(CONFIGS[name])
    for key, value in _WIDE.items():
        setattr(config, key, value)
    return config


MODELS = {
    "llama": lambda: wide("llama"),
    "qwen3": lambda: wide("qwen3"),
    "window": lambda: wide("mistral-window"),
    "softcap": lambda: CONFIGS["gemma2-softcap"],
    "sinks": lambda: CONFIGS["gpt-oss-sinks"],
    "mla": lambda: CONFIGS["deepseek-mla"],
}


class Case(NamedTuple):
    backend: str
    model: str
    dtype: str
    device: str = "cuda"


# FlashInfer compiles a kernel for each combination: two will do.
CASES = [
    *(Case("sdpa", model, "float32") for model in MODELS),
    Case("sdpa", "llama", "bfloat16"),
    *(Case("triton", model, "float32") for model in MODELS),
    *(Case("triton", model, "bfloat16") for model in ("llama", "window")),
    *(Case("torch-flash", model, "bfloat16") for model in ("llama", "qwen3", "window")),
    *(Case("flashinfer-fa2", model, "bfloat16") for model in ("llama", "qwen3")),
    *(Case("flashinfer-fa3", model, "bfloat16") for model in ("llama", "qwen3")),
]
SHAPES: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 13},
    "one-at-a-time": {"max_num_seqs": 1},
    "layer-slabs": {"layers_per_slab": 1},
    "no-overlap": {"overlap": False},
    "no-graphs": {"graphs": False},
}


def prompts(vocab: int) -> list[list[int]]:
    rng = random.Random(5)
    sizes = [1, 2, 5, 12, 33, 60, 90, 17, 16, 3]
    return [[rng.randrange(3, vocab) for _ in range(size)] for size in sizes]


@cache
def build(name: str, dtype: str, device: str) -> tuple[LoadedModel, Any]:
    """The model, hooked; and one of the same weights, not hooked, in float32."""
    torch.manual_seed(7)
    model = tf.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)  # so that choices differ
    model = model.to(device=device, dtype=getattr(torch, dtype))
    reference = copy.deepcopy(model).float()
    reference.set_attn_implementation("eager")
    # End tokens would be left out of answers that ignore them, and the reference has none.
    return replace(prepare(model), eos_ids=frozenset()), reference


@contextmanager
def engine(
    loaded: LoadedModel, backend: str, cache: Path, log: list[str], **settings: Any
) -> Iterator[Assembly]:
    chosen = {"max_num_seqs": 7, "max_num_batched_tokens": 64, "optimize": False} | settings
    wanted = Settings("", "parity", "parity", cache, attention=backend, **chosen)
    with Assembly(loaded, wanted, log.append) as made:
        yield made


def outputs(made: Assembly, given: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True)
    for row, ids in enumerate(given):
        made.engine.add(Request(row, 0, tuple(ids), params, 0))
    done: dict[int, list[int]] = {}
    while made.engine.has_work:
        for completion in made.engine.step():
            assert completion.error is None
            done[completion.request.row] = list(completion.token_ids)
    return [done[row] for row in range(len(given))]


def generate(reference: Any, ids: list[int]) -> list[int]:
    """What transformers itself continues the prompt with."""
    given = torch.tensor([ids], device=reference.device)
    got = reference.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return got[0, len(ids) :].tolist()


def worst_gap(reference: Any, ids: list[int], output: list[int]) -> float:
    """How far below the largest logit the chosen ones lie at worst, as a share of the largest."""
    given = torch.tensor([[*ids, *output[:-1]]], device=reference.device)
    with torch.inference_mode():
        logits = reference(input_ids=given).logits[0, len(ids) - 1 :].float()
    chosen = logits.gather(1, torch.tensor(output, device=logits.device)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.abs().amax(1)).max())


def check(reference: Any, dtype: str, given: list[list[int]], got: list[list[int]]) -> None:
    for ids, output in zip(given, got, strict=True):
        assert len(output) == MAX_TOKENS
        assert worst_gap(reference, ids, output) <= TOLERANCE[dtype]


def skip_unless_usable(backend: str, loaded: LoadedModel) -> None:
    """FlashInfer is optional, and too slow to compile here; the others must work."""
    geometry = Geometry(loaded.layers, 256, 8, 8, 64, loaded.dtype, loaded.device)
    if backend.startswith("flashinfer"):
        reason = attention.unsupported_reason(backend, geometry, compiled=True)
        if reason is not None:
            pytest.skip(reason)


def on_devices(cases: list[Case]) -> list[Any]:
    """Each case on a GPU, and on the CPU those that can run there."""
    here = [case._replace(device="cpu") for case in cases if case.backend == "sdpa"]
    there = [pytest.param(case, marks=CUDA.marks, id="-".join(case)) for case in cases]
    return [*(pytest.param(case, id="-".join(case)) for case in here), *there]


@pytest.mark.parametrize("case", on_devices(CASES))
def test_every_token_is_the_models_own_choice(case: Case, tmp_path: Path) -> None:
    loaded, reference = build(case.model, case.dtype, case.device)
    skip_unless_usable(case.backend, loaded)
    given = prompts(loaded.model.config.vocab_size)
    with engine(loaded, case.backend, tmp_path, log := []) as made:
        assert made.executor.backend.name == case.backend
        got = outputs(made, given)
    check(reference, case.dtype, given, got)
    assert not [line for line in log if "no CUDA graph" in line], log
    if case.dtype == "float32":
        same = sum(generate(reference, ids) == ours for ids, ours in zip(given, got, strict=True))
        assert same >= len(given) - 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "case",
    on_devices([Case("sdpa", "llama", "float32"), Case("torch-flash", "llama", "bfloat16")]),
)
def test_however_steps_are_made_up(case: Case, shape: str, tmp_path: Path) -> None:
    loaded, reference = build(case.model, case.dtype, case.device)
    given = prompts(loaded.model.config.vocab_size)
    with engine(loaded, case.backend, tmp_path, [], **SHAPES[shape]) as made:
        got = outputs(made, given)
        check_arena(made.arena)
        assert made.arena.num_open <= 1  # a slot for what fills graphs up
    check(reference, case.dtype, given, got)


@pytest.mark.parametrize("device", [CUDA])
def test_fused_and_compiled_modules_choose_the_same(device: str, tmp_path: Path) -> None:
    loaded, reference = build.__wrapped__("llama", "bfloat16", device)  # whose modules will change
    given = prompts(loaded.model.config.vocab_size)
    with engine(loaded, "auto", tmp_path, [], optimize=True) as made:
        got = outputs(made, given)
    check(reference, "bfloat16", given, got)


def test_a_wrong_token_is_found() -> None:
    loaded, reference = build("llama", "float32", "cpu")
    ids = prompts(199)[3]
    right = generate(reference, ids)
    assert worst_gap(reference, ids, right) == 0
    wrong = [*right[:5], (right[5] + 1) % 199, *right[6:]]
    assert worst_gap(reference, ids, wrong) > TOLERANCE["bfloat16"]
    assert loaded.model is not reference
