"""Native layers compute what transformers' do, and a row's numbers depend on that row alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

from batchrun.engine import cpu
from batchrun.engine.attention import QKV, LayerAttention
from batchrun.engine.core import SamplingParams
from batchrun.engine.cpu import Level, library
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu import layers as cpu_layers
from batchrun.engine.cpu import sampling as cpu_sampling
from batchrun.engine.cpu.layers import NativeLayer
from batchrun.engine.cpu.linear import (
    NativeEmbedding,
    NativeLinear,
    PackedWeight,
    fits,
    rms_norm,
)
from batchrun.engine.enginestats import EngineStats
from batchrun.engine.model import fused
from batchrun.engine.model.hook import attending
from batchrun.engine.model.invariant import varying_operator
from batchrun.engine.model.layers import logits_of
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import prepare
from batchrun.errors import ModelError
from tests.attention.test_native import KINDS
from tests.parity.models import _SMALL
from tests.parity.runner import outputs, rig, run
from tests.parity.test_generate import prompts

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
ROUNDING = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = {**_SMALL, "head_dim": 32}
NATIVE = {
    "llama": tf.LlamaConfig(**SMALL),
    "biases": tf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "no groups": tf.LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "one key head": tf.LlamaConfig(**{**SMALL, "num_key_value_heads": 1}),
    "wide": tf.LlamaConfig(**{**SMALL, "hidden_size": 416, "intermediate_size": 1536}),
    "qwen2": tf.Qwen2Config(**{**_SMALL, "hidden_size": 128}),
    "qwen3": tf.Qwen3Config(**SMALL),
    "mistral": tf.MistralConfig(**SMALL, sliding_window=11),
}
OTHERS = {
    "heads of 16": tf.LlamaConfig(**_SMALL),
    "another activation": tf.LlamaConfig(**SMALL, hidden_act="gelu"),
    "residual multiplier": tf.GraniteConfig(**SMALL, residual_multiplier=0.5),
    "norms behind": tf.Olmo2Config(**SMALL),
    "norms of one plus the weight": tf.GemmaConfig(**SMALL, hidden_activation="silu"),
    "experts": tf.Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


@pytest.fixture(params=KINDS)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Each dtype, by each way to compute with it that this CPU has."""
    found, level = KINDS[request.param]
    if cpu.level() < level:
        pytest.skip(f"this CPU has no {level.name.lower()} of bfloat16")
    if why := library.unsupported_reason(found):
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "level", lambda: level)
        yield found


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def made(config: tf.PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> tf.PreTrainedModel:
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif "bias" in name:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def layers(model: nn.Module) -> list[NativeLayer]:
    return [module for module in model.modules() if isinstance(module, NativeLayer)]


@pytest.mark.parametrize("name", NATIVE)
def test_layers_built_like_llamas_become_native(name: str, dtype: torch.dtype) -> None:
    exact = logits_of(prepare(made(NATIVE[name], dtype).float()).model)
    loaded = prepare(made(NATIVE[name], dtype))
    before, size = logits_of(loaded.model), loaded.weights_bytes
    assert optimize(loaded.model, compile=False, log=pytest.fail)[0] == "native layers"
    assert len(layers(loaded.model)) == 3
    assert not [m for m in loaded.model.modules() if type(m) is nn.Linear]
    assert loaded.weights_bytes >= size
    after = logits_of(loaded.model)
    # No further from the numbers in float32 than transformers is in half precision.
    off = 1.2 * torch.dist(before, exact) if dtype != torch.float32 else 1e-4 * exact.norm()
    assert torch.dist(after, exact) < off
    assert optimize(loaded.model, compile=False, log=pytest.fail)[0] == "native layers"


@pytest.mark.parametrize("name", OTHERS)
def test_others_keep_their_layers_and_get_native_linear_layers(
    name: str, dtype: torch.dtype
) -> None:
    loaded = prepare(made(OTHERS[name], dtype))
    before = logits_of(loaded.model)
    optimize(loaded.model, compile=False, log=pytest.fail)
    assert not layers(loaded.model)
    assert [m for m in loaded.model.modules() if isinstance(m, NativeLinear)]
    scale = 0.05 * float(before.abs().max())
    torch.testing.assert_close(logits_of(loaded.model), before, rtol=0, atol=scale)


def test_layers_without_positions_stay_among_native_ones(dtype: torch.dtype) -> None:
    config = tf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1])
    loaded = prepare(made(config, dtype))
    before = logits_of(loaded.model)
    optimize(loaded.model, compile=False, log=pytest.fail)
    assert [layer.layer_idx for layer in layers(loaded.model)] == [0, 2]
    scale = 0.05 * float(before.abs().max())
    torch.testing.assert_close(logits_of(loaded.model), before, rtol=0, atol=scale)


@pytest.mark.parametrize("k", [1, 32, 48, 1536])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 200])
def test_linear_layers(n: int, k: int, dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(n + k)
    torchs = nn.Linear(k, n, bias=n % 2 == 1).to(dtype)
    native = NativeLinear(torchs, dtype)
    assert torch.equal(native.weight, torchs.weight)
    x = torch.randn(700, k, dtype=dtype)
    exact = torchs.double()(x.double())
    with torch.inference_mode():
        whole = native(x)
        off = ROUNDING[dtype]
        torch.testing.assert_close(whole.double(), exact, rtol=off, atol=off)
        for rows in (0, 1, 7, 13, 15, 16, 17, 31, 33, 256, 513):
            assert torch.equal(native(x[:rows]), whole[:rows])
            assert torch.equal(native(x[700 - rows :]), whole[700 - rows :])


class RowByRow:
    """Attention that makes of each row something of its own."""

    def attend(self, layer_index: int, layer: LayerAttention, new: QKV) -> torch.Tensor:
        query, key, value = new
        group = query.shape[1] // key.shape[1]
        return query + key.repeat_interleave(group, 1) * value.repeat_interleave(group, 1)


@pytest.mark.parametrize("name", ["biases", "wide", "qwen3"])
def test_a_rows_numbers_depend_on_that_row_alone(
    name: str, dtype: torch.dtype, threads: int
) -> None:
    model = made(NATIVE[name], dtype)
    layer = NativeLayer(model.model.layers[1], 1, LayerAttention(1.0))
    x = torch.randn(1, 700, model.config.hidden_size, dtype=dtype)
    angles = torch.rand(1, 700, 16).repeat(1, 1, 2) * 6
    positions = (angles.cos().to(dtype), angles.sin().to(dtype))

    def rows(begin: int, end: int) -> torch.Tensor:
        cos, sin = (tensor[:, begin:end] for tensor in positions)
        part: Any = x[:, begin:end]
        with attending(RowByRow()):
            out: torch.Tensor = layer(part, position_embeddings=(cos, sin))
        return out[0]

    with torch.inference_mode():
        torch.set_num_threads(1)
        whole = rows(0, 700)
        torch.set_num_threads(threads)
        for begin, end in ((0, 700), (0, 1), (5, 37), (130, 386), (699, 700), (300, 301), (0, 520)):
            assert torch.equal(rows(begin, end), whole[begin:end])


def test_a_weight_that_native_code_cannot_take_stays() -> None:
    assert not fits(nn.Linear(32, 8), torch.bfloat16)
    assert not fits(nn.Identity(), torch.float32)
    weight = torch.randn(70, 50, dtype=torch.bfloat16)
    for level in Level:
        assert torch.equal(PackedWeight(weight, None, None, level).unpack(), weight)


def test_without_a_compiler_torchs_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "build", lambda *_: (_ for _ in ()).throw(OSError("no compiler")))
    monkeypatch.setattr(library, "unsupported_reason", library.unsupported_reason.__wrapped__)
    monkeypatch.setattr(library, "_arithmetic", library._arithmetic.__wrapped__)
    loaded = prepare(made(NATIVE["llama"]))
    lines: list[str] = []
    applied = optimize(loaded.model, compile=False, log=lines.append)
    assert applied == ("merged projections", "fused norms")
    why = "it can't be compiled: no compiler"
    assert lines == [f"layers are computed by torch, not by native code: {why}"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (9, 4096), (2, 151936)])
def test_the_first_of_the_highest(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape).bfloat16()
    logits[0, shape[1] // 2 :: 5] = 9
    assert torch.equal(cpu_sampling.most_likely(logits), logits.max(dim=-1).indices)
    assert torch.equal(cpu_sampling.most_likely(logits[:, ::2]), logits[:, ::2].max(dim=-1).indices)
    for none in (-torch.inf, torch.inf, torch.nan):
        logits[0, shape[1] // 3] = none
        if none != -torch.inf:  # one is enough
            assert cpu_sampling.most_likely(logits).tolist()[0] == -1
        assert cpu_sampling.most_likely(torch.full_like(logits, none)).tolist() == [-1] * shape[0]


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_norms(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 96) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]
    x = x.to(dtype)
    weight = torch.randn(96)
    want = nn.functional.rms_norm(x.float(), (96,), weight, 1e-5)
    got = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got.float(), want, rtol=ROUNDING[dtype], atol=1e-6)


def test_a_table_of_positions_has_what_the_model_computes() -> None:
    rotary = made(NATIVE["llama"]).model.rotary_emb
    table = cpu_layers.RotaryTable(rotary)
    for dtype, positions in (
        (torch.bfloat16, [0, 7, 7, 200]),
        (torch.bfloat16, [1023, 1024]),  # more than it holds at first
        (torch.bfloat16, [5]),
        (torch.float32, [70_000]),
    ):
        x, ids = torch.zeros(1, dtype=dtype), torch.tensor([positions])
        for got, want in zip(table(x, ids), rotary(x, position_ids=ids), strict=True):
            assert torch.equal(got, want)


def test_layers_of_one_shape_become_one_module() -> None:
    model = made(NATIVE["llama"])
    optimize(prepare(model).model, compile=False, log=pytest.fail)
    assert [type(layer) for layer in model.model.layers] == [cpu_layers.NativeStack]
    assert isinstance(model.model.rotary_emb, cpu_layers.RotaryTable)
    with pytest.raises(ValueError, match="no cache"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)


def test_native_code_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "rms_norm", lambda x, weight, eps: x * 0.5)
    with pytest.raises(ModelError, match="computes LlamaForCausalLM wrongly: logits differ"):
        optimize(prepare(made(NATIVE["llama"])).model, compile=False, log=pytest.fail)


@pytest.mark.parametrize("common", [0, 170])
def test_tokens_do_not_depend_on_the_batch(common: int, dtype: torch.dtype) -> None:
    """Nor on whether others begin alike, whose common keys are then read once."""
    loaded = prepare(made(NATIVE["llama"], dtype))
    optimize(loaded.model, compile=False, log=pytest.fail)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    many = [(*(7 * i % 90 for i in range(common)), *prompt) for prompt in prompts()[:12]]
    with rig(loaded, attention="native", max_num_batched_tokens=64) as made_:
        together = outputs(run(made_, many, params))
    with rig(loaded, attention="native", max_num_batched_tokens=23, max_num_seqs=1) as made_:
        alone = outputs(run(made_, many, params))
    assert together == alone


def test_guessed_tokens_are_those_of_one_step_each(dtype: torch.dtype) -> None:
    """With everything that depends on a token's place: draws, scores, ends."""
    loaded = prepare(made(NATIVE["llama"], dtype))
    optimize(loaded.model, compile=False, log=pytest.fail)
    kinds: list[dict[str, Any]] = [
        {"ignore_eos": True},
        {"temperature": 0.3, "top_p": 0.9, "scored": True, "ignore_eos": True},
        {"min_tokens": 20, "stop_token_ids": tuple(range(0, 99, 7))},
        {"presence_penalty": 0.5, "max_tokens": 9},
        {"num_beams": 2, "max_tokens": 9},
    ]
    many = [prompt * 3 for prompt in prompts()[:20]]
    each = [SamplingParams(**{"max_tokens": 70, **kinds[i % 5]}) for i in range(len(many))]

    def results(*, drafts: bool) -> tuple[EngineStats, list[tuple[object, ...]]]:
        with rig(loaded, attention="native", drafts=drafts) as made_:
            done = run(made_, many, each)
            return made_.engine.stats, [(c.token_ids, c.logprob, c.finish_reason) for c in done]

    stepwise, wanted = results(drafts=False)
    guessing, found = results(drafts=True)
    assert found == wanted
    assert stepwise.drafted_tokens == 0
    assert 100 < guessing.accepted_tokens < guessing.drafted_tokens
    assert guessing.decode_tokens == stepwise.decode_tokens
    assert guessing.generated_tokens == stepwise.generated_tokens


def test_a_tied_head_holds_the_embedding_too(dtype: torch.dtype) -> None:
    model = made(tf.LlamaConfig(**SMALL, tie_word_embeddings=True), dtype)
    loaded = prepare(model)
    embedding = model.get_input_embeddings()
    ids = torch.tensor([[0, 5, 98, 31, 32, 33]])
    want, size, logits = embedding(ids), loaded.weights_bytes, logits_of(model)
    optimize(model, compile=False, log=pytest.fail)
    native = model.get_input_embeddings()
    assert isinstance(native, NativeEmbedding)
    assert native.num_embeddings == embedding.num_embeddings
    assert torch.equal(native(ids), want)
    assert varying_operator(model) is None
    assert loaded.weights_bytes < 1.1 * size  # panels of 32 rows, and norms in float32
    scale = 0.05 * float(logits.abs().max())
    torch.testing.assert_close(logits_of(model), logits, rtol=0, atol=scale)


class _Doubled(nn.Linear):
    """A linear layer by name alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_whatever_is_a_linear_layer_becomes_native(dtype: torch.dtype) -> None:
    gpt2 = tf.GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    falcon = tf.FalconConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    for config in (gpt2, falcon):
        model = made(config, dtype)
        loaded = prepare(model)
        before = logits_of(model)
        optimize(loaded.model, compile=False, log=pytest.fail)
        assert not [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
        scale = 0.05 * float(before.abs().max())
        torch.testing.assert_close(logits_of(model), before, rtol=0, atol=scale)
    model = made(NATIVE["llama"], dtype)
    mlp = model.model.layers[1].mlp
    mlp.down_proj = _Doubled(mlp.down_proj.in_features, 64, bias=False).to(dtype)
    before = logits_of(prepare(model).model)
    optimize(model, compile=False, log=pytest.fail)
    assert type(model.model.layers[1].mlp.down_proj) is _Doubled
    scale = 0.05 * float(before.abs().max())
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=scale)
