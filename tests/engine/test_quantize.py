"""Weights of 8 bits: close to the whole ones, half their size, the same in native code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchrun.engine.core import SamplingParams
from batchrun.engine.cpu import library
from batchrun.engine.cpu.layers import NativeLayer
from batchrun.engine.model import gates
from batchrun.engine.model.int8 import Int8Linear, int8_weights
from batchrun.engine.model.layers import logits_of
from batchrun.engine.model.loading import load
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import LoadedModel, prepare
from batchrun.models.resolve import ModelRef
from tests.engine.test_cpu_layers import NATIVE, made
from tests.pairs import part
from tests.parity.models import build
from tests.parity.runner import outputs, rig, run
from tests.parity.test_generate import prompts

needs_native = pytest.mark.skipif(
    library.unsupported_reason(torch.bfloat16) is not None, reason="no compiler"
)


def test_each_weight_is_within_half_a_step_of_what_it_was() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    linear.weight.data[3] = 0
    linear.weight.data[5] *= 1000
    eight = Int8Linear(linear)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    error = (eight.weight * eight.scales[:, None] - linear.weight).abs()
    assert (error <= 0.501 * step).all()
    x = torch.randn(2, 7, 96)
    linear.weight.data = eight.weight * eight.scales[:, None]
    torch.testing.assert_close(eight(x), linear(x), rtol=1e-4, atol=1e-4)
    assert eight.weight.nbytes == 40 * 96


def test_sums_of_whole_weights_stay_within_float16() -> None:
    linear = nn.Linear(8192, 3, bias=False)
    linear.weight.data.fill_(0.01)
    x = torch.full((1, 8192), 4.0, dtype=torch.float16)
    got = Int8Linear(linear)(x)
    torch.testing.assert_close(got.float(), torch.full((1, 3), 327.68), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt-neox", "phi3"])
def test_any_architecture_computes_with_them(name: str) -> None:
    whole = logits_of(prepare(build(name)).model)
    model = build(name)
    int8_weights(model)
    loaded = prepare(model)
    assert not [m for m in model.modules() if type(m) is nn.Linear]
    got = logits_of(loaded.model)
    assert float(torch.cosine_similarity(got, whole, 0)) > 0.99
    optimize(loaded.model, compile=False, log=pytest.fail)
    torch.testing.assert_close(logits_of(loaded.model), got, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize(("name", "dtype"), part(2, [*NATIVE], [torch.float32, torch.bfloat16]))
def test_native_layers_take_them(name: str, dtype: torch.dtype) -> None:
    model = made(NATIVE[name], dtype)
    int8_weights(model)
    loaded = prepare(model)
    before = logits_of(loaded.model)
    assert optimize(loaded.model, compile=False, log=pytest.fail)[0] == "native layers"
    assert len([m for m in model.modules() if isinstance(m, NativeLayer)]) == 3
    assert not [m for m in model.modules() if isinstance(m, Int8Linear)]
    scale = 0.05 * float(before.abs().max())
    torch.testing.assert_close(logits_of(loaded.model), before, rtol=0, atol=scale)
    assert outputs_of(loaded, 8) == outputs_of(loaded, 1)


def outputs_of(loaded: LoadedModel, sequences: int) -> list[list[int]]:
    with rig(loaded, attention="native", max_num_seqs=sequences) as engine:
        return outputs(run(engine, prompts()[:8], SamplingParams(max_tokens=12, ignore_eos=True)))


def test_the_default_model_has_half_the_weights_and_nearly_the_same_logits(
    smollm2: ModelRef,
) -> None:
    whole = load(str(smollm2.path), dtype="bfloat16")
    eight = load(str(smollm2.path), dtype="bfloat16", quantize="int8")
    # The embedding, which is the head as well, stays as it is beside the head's copy.
    embedding = whole.model.get_input_embeddings().weight.nbytes
    assert eight.weights_bytes - embedding < 0.52 * whole.weights_bytes
    want, got = logits_of(whole.model), logits_of(eight.model)
    assert float(torch.cosine_similarity(got, want, 0)) > 0.998
    optimize(eight.model, compile=False, log=pytest.fail)
    with rig(eight, attention="native") as engine:
        assert gates.verify(eight, engine.executor, engine.arena, 64) < 0.06
