"""Optimised models give the logits and the tokens that they gave before."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from batchrun.engine.core import SamplingParams
from batchrun.engine.model import gates
from batchrun.engine.model import optimize as optimizing
from batchrun.engine.model.fused import FusedNorm, Projection, Undo, merge_projections
from batchrun.engine.model.hook import HOOK, set_attention
from batchrun.engine.model.optimize import wait_for_compilers
from batchrun.engine.model.prepare import LoadedModel, prepare
from tests.pairs import part
from tests.parity.models import CONFIGS, build
from tests.parity.runner import generate, outputs, rig, run
from tests.parity.test_generate import prompts

MAX_TOKENS = 8
PROMPTS = prompts()[:10]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


optimize = partial(optimizing.optimize, native=False)  # torch's operators, as on a GPU


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.set_num_threads(threads)


@cache
def wanted(name: str) -> list[list[int]]:
    """What `generate` gives with the model as transformers made it."""
    model = prepare(build(name)).model
    return [generate(model, prompt, MAX_TOKENS) for prompt in PROMPTS]


def completions(loaded: LoadedModel) -> list[list[int]]:
    with rig(loaded, max_num_batched_tokens=29) as r:
        return outputs(run(r, PROMPTS, SamplingParams(max_tokens=MAX_TOKENS)))


def eager_logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([prompts()[5]])
    set_attention(model, "eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    set_attention(model, HOOK)
    return logits


def storages(model: nn.Module) -> int:
    held = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in held.values())


def modules(model: nn.Module, kind: type) -> list[Any]:
    return [m for m in model.modules() if type(m) is kind]


@pytest.mark.parametrize("name", part(2, [*CONFIGS], whole=["llama"]))
def test_fused_models_give_the_same_logits_and_tokens_and_take_no_more_memory(name: str) -> None:
    loaded = prepare(build(name))
    before, size, held = eager_logits(loaded.model), loaded.weights_bytes, storages(loaded.model)
    log: list[str] = []
    applied = optimize(loaded.model, compile=False, log=log.append)
    assert log == []
    assert "compiled layers" not in applied
    torch.testing.assert_close(eager_logits(loaded.model), before, rtol=1e-5, atol=1e-5)
    assert loaded.weights_bytes == size
    assert storages(loaded.model) == held
    assert completions(loaded) == wanted(name)
    assert [generate(loaded.model, p, MAX_TOKENS) for p in PROMPTS[:2]] == wanted(name)[:2]
    with rig(loaded) as r:
        assert gates.verify(loaded, r.executor, r.arena, 64) < 1e-4


@pytest.mark.parametrize(
    ("name", "projections", "norms", "offset"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 7, 0),
        ("qwen2", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 7, 0),  # with biases
        ("qwen3", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 13, 0),  # norms of heads
        ("gemma3", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], 19, 1),
        ("starcoder2", ["q_proj", "k_proj", "v_proj"], 0, None),  # layer norms
        ("mixtral-moe", ["q_proj", "k_proj", "v_proj"], 7, 0),
        ("phi3", [], 7, 0),  # merged by its makers
        ("gpt-neox", [], 0, None),
    ],
)
def test_what_is_fused_is_found_by_structure(
    name: str, projections: list[str], norms: int, offset: int | None
) -> None:
    model = build(name)
    optimize(prepare(model).model, compile=False, log=pytest.fail)
    merged = Counter(
        path.rsplit(".", 1)[-1] for path, m in model.named_modules() if type(m) is Projection
    )
    assert merged == dict.fromkeys(projections, 3)
    found = modules(model, FusedNorm)
    assert len(found) == norms
    assert {norm.offset for norm in found} == ({offset} if norms else set())


def test_latent_attention_merges_what_reads_the_layers_input() -> None:
    model = build("deepseek-mla")
    optimize(prepare(model).model, compile=False, log=pytest.fail)
    attention = model.model.layers[0].self_attn
    assert type(attention.q_a_proj) is type(attention.kv_a_proj_with_mqa) is Projection
    assert type(attention.q_b_proj) is nn.Linear


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_half_precision_differs_by_rounding_alone(name: str) -> None:
    model = build(name)
    exact = eager_logits(model)
    model.to(torch.bfloat16)
    prepare(model)
    plain = (eager_logits(model) - exact).abs().mean()
    applied = optimize(model, compile=False, log=pytest.fail)
    assert applied[:2] == ("merged projections", "fused norms")
    fused = (eager_logits(model) - exact).abs().mean()
    assert fused < 1.2 * plain


def test_weights_exist_once_while_what_they_were_can_still_be_put_back() -> None:
    model = prepare(build("qwen2")).model
    held = storages(model)
    undo: Undo = []
    merge_projections(model, lambda: eager_logits(model), undo)
    assert len(undo) == 15
    assert storages(model) == held
    assert storages(nn.ModuleList([model, *(module for _, _, module in undo)])) == held


def test_tied_weights_stay_tied_and_shared_layers_are_left_alone() -> None:
    config = tf.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "tie_word_embeddings": True})
    torch.manual_seed(1)
    model = tf.LlamaForCausalLM(config).eval()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    loaded = prepare(model)
    before, size = eager_logits(model), loaded.weights_bytes
    optimize(model, compile=False, log=pytest.fail)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert second.up_proj.weight is first.up_proj.weight
    assert loaded.weights_bytes == size == storages(model) + sum(b.nbytes for b in model.buffers())
    torch.testing.assert_close(eager_logits(model), before, rtol=1e-5, atol=1e-5)


def test_a_merged_part_that_gets_another_input_is_computed_from_it() -> None:
    model = build("llama")
    mlp = model.model.layers[0].mlp
    gate, up = mlp.gate_proj, mlp.up_proj
    a, b = torch.randn(2, 3, 64)
    want = gate(a), up(b), up(a)
    optimize(prepare(model).model, compile=False, log=pytest.fail)
    torch.testing.assert_close((mlp.gate_proj(a), mlp.up_proj(b), mlp.up_proj(a)), want)
    torch.testing.assert_close(mlp.up_proj.weight, up.weight)


def test_a_second_call_changes_nothing() -> None:
    model = prepare(build("llama")).model
    first = optimize(model, compile=False, log=pytest.fail)
    names = [*model.state_dict()]
    assert optimize(model, compile=False, log=pytest.fail) == first
    assert [*model.state_dict()] == names


class _MeanNorm(LlamaRMSNorm):
    """Looks like a root-mean-square norm and divides by the mean of absolute values."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        size = hidden_states.abs().mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * hidden_states / size


def test_a_norm_of_other_mathematics_is_left_alone() -> None:
    model = build("llama")
    model.model.norm = _MeanNorm(64, 1e-6)
    before = eager_logits(prepare(model).model)
    optimize(model, compile=False, log=pytest.fail)
    assert type(model.model.norm) is _MeanNorm
    assert len(modules(model, FusedNorm)) == 6
    torch.testing.assert_close(eager_logits(model), before, rtol=1e-5, atol=1e-5)


class _Overwriting(LlamaMLP):
    """Changes its input between the two projections of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x.mul_(3)))  # type: ignore[no-any-return]


def test_a_model_that_fusing_would_change_stays_as_it_is() -> None:
    model = build("llama")
    model.model.layers[1].mlp = _Overwriting(model.config)
    before = eager_logits(prepare(model).model)
    names, log = [*model.state_dict()], []
    assert optimize(model, compile=False, log=log.append) == ()
    assert len(log) == 1
    assert "layer 1 computes something else" in log[0]
    assert [*model.state_dict()] == names
    torch.testing.assert_close(eager_logits(model), before, rtol=0, atol=0)


ALL = ("merged projections", "fused norms", "compiled layers")


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_one_compiled_graph_serves_all_layers_and_batches(name: str) -> None:
    loaded = prepare(build(name))
    before = eager_logits(loaded.model)
    graphs = torch._dynamo.utils.counters["stats"]
    compiled = graphs["unique_graphs"]
    assert optimize(loaded.model, compile=True, log=pytest.fail) == ALL
    assert graphs["unique_graphs"] == compiled + 1
    # Windows and score caps differ by layer; steps mix chunks, decodes and single tokens.
    with torch.compiler.set_stance("fail_on_recompile"):
        assert completions(loaded) == wanted(name)
        with rig(loaded) as r:
            assert gates.verify(loaded, r.executor, r.arena, 64) < 1e-4
        torch.testing.assert_close(eager_logits(loaded.model), before, rtol=1e-5, atol=1e-5)
    assert optimize(loaded.model, compile=True, log=pytest.fail) == ALL


@needs_compiler
def test_no_compiler_outlives_the_compilation() -> None:
    """The process would wait for them, for seconds, when it ends."""
    from torch._inductor.async_compile import AsyncCompile, _pool_set  # noqa: PLC0415

    AsyncCompile.process_pool()  # as on a machine where this was compiled before, or has one core
    assert _pool_set
    assert optimize(prepare(build("llama")).model, compile=True, log=pytest.fail) == ALL
    wait_for_compilers()
    assert not _pool_set


@needs_compiler
def test_without_a_working_compiler_layers_run_uncompiled() -> None:
    import torch._inductor.config as inductor  # noqa: PLC0415
    from torch._inductor.utils import fresh_cache  # noqa: PLC0415

    loaded, log = prepare(build("llama")), []
    with fresh_cache(), inductor.patch({"cpp.cxx": ("/nonexistent/c++",)}):
        assert optimize(loaded.model, compile=True, log=log.append) == ALL[:2]
    assert len(log) == 1
    assert "uncompiled" in log[0]
    assert completions(loaded) == wanted("llama")


@needs_compiler
def test_a_compilation_that_fails_later_costs_no_token() -> None:
    import torch._inductor.config as inductor  # noqa: PLC0415
    from torch._inductor.utils import fresh_cache  # noqa: PLC0415

    loaded, log = prepare(build("llama")), []
    assert optimize(loaded.model, compile=True, log=log.append) == ALL
    torch.compiler.reset()
    with fresh_cache(), inductor.patch({"cpp.cxx": ("/nonexistent/c++",)}):
        assert completions(loaded) == wanted("llama")
    assert len(log) == 1
    assert "uncompiled" in log[0]


class _Counting(LlamaMLP):
    """Computes with the number of tokens in Python, so that each number needs its own graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float(len("." * x.shape[1]) > 0)


class _Looking(LlamaMLP):
    """Reads a value back in the middle, so that it can't be one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if x.sum().item() > 1e9 else 1.0)


@needs_compiler
@pytest.mark.parametrize("kind", [_Counting, _Looking])
def test_layers_that_can_not_be_one_graph_run_uncompiled(kind: type[LlamaMLP]) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.__class__ = kind
    loaded, log = prepare(model), []
    assert optimize(loaded.model, compile=True, log=log.append) == ALL[:2]
    assert len(log) == 1
    assert "uncompiled" in log[0]
    assert completions(loaded) == wanted("llama")
