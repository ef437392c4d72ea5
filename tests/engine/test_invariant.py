"""A row's bits depend on that row alone: not on its batch, how it was cut, or the threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional

from batchrun.engine import invariance
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import EngineError, SamplingParams
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.cpu import library
from batchrun.engine.cpu.compile import CompileError
from batchrun.engine.invariance import VariesError
from batchrun.engine.model import invariant, rows
from batchrun.engine.model.judge import difference
from batchrun.engine.model.layers import logits_of
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import LoadedModel, prepare
from tests.allocator.invariants import check_arena
from tests.parity.models import CONFIGS, build
from tests.parity.runner import outputs, rig, run
from tests.parity.test_generate import prompts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 2, 3)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
FEW = ["llama", "gemma2-softcap", "gpt-oss-sinks", "llama4-chunks", "mixtral-moe"]
OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in CONFIGS if name not in FEW]
# Its rotary embedding looks for the longest sequence of the batch.
VARYING = {"phimoe-window": "torch's max in PhimoeRotaryEmbedding may depend on the batch"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


def rotated(x: torch.Tensor) -> torch.Tensor:
    """As Llama 4 applies positions."""
    pairs = torch.view_as_complex(x.float().reshape(len(x), -1, 2))
    turns = torch.view_as_complex(x.float().cos().reshape(len(x), -1, 2))
    return torch.view_as_real(pairs * turns).flatten(1)


REPAIRED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    *(functional.silu, functional.gelu, gelu_tanh, functional.mish, functional.softplus),
    *(torch.sigmoid, functional.elu, torch.exp2, rotated),
    lambda x: x.abs().rsqrt(),
    lambda x: 1.7 ** (x / 4),
    lambda x: torch.stack([x] * 19).mul(torch.arange(19)[:, None, None]).sum(0),
]
ALIKE: list[Callable[[torch.Tensor], torch.Tensor]] = [
    *(torch.exp, torch.tanh, torch.erf, torch.cos, torch.sin, torch.square, torch.reciprocal),
    lambda x: x.abs().log(),
    lambda x: x.abs().log1p(),
    lambda x: x.abs().sqrt(),
    lambda x: x.pow(3.0) * 0.3 + x / 3.7,
    lambda x: x.softmax(-1),
    lambda x: x.sum(-1, keepdim=True),
    lambda x: x.pow(2).mean(-1, keepdim=True),
    lambda x: x.norm(dim=-1, keepdim=True),
    lambda x: x.topk(3, -1).values,
    lambda x: functional.rms_norm(x, x.shape[-1:]),
    lambda x: functional.layer_norm(x, x.shape[-1:]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", REPAIRED + ALIKE)
def test_functions(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
    run_ = rows.by_rows(function) if function in REPAIRED else function
    torch.manual_seed(0)
    for width in (8, 24, 64, 100, 1088):
        x = (torch.randn(140, width) * 3).to(dtype)
        torch.set_num_threads(1)
        alone = torch.cat([run_(row) for row in x.split(1)])
        torch.testing.assert_close(alone, function(x), rtol=1e-2, atol=1e-2)
        for threads in THREADS:
            torch.set_num_threads(threads)
            for begin, end in ((0, 140), (3, 36), (5, 132)):
                assert torch.equal(run_(x[begin:end]), alone[begin:end]), (width, threads, end)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 33, 250])
@pytest.mark.parametrize("k", [8, 100, 2048])
def test_products(k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k + n)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    x = torch.randn(130, k).to(dtype)
    other = weight.mT.contiguous()
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: functional.linear(x, weight, bias),
        lambda x: x @ weight.T,
        lambda x: torch.addmm(bias, x, other),
        lambda x: torch.bmm(torch.stack([x, -x]), torch.stack([other, other]))[1],
    ]
    for way in ways:
        computed = rows.by_rows(way)
        torch.set_num_threads(1)
        whole = computed(x)
        assert difference(whole, way(x)) < {4: 1e-5, 2: 1e-2}[dtype.itemsize]
        for threads in THREADS:
            torch.set_num_threads(threads)
            for begin, end in ((0, 130), (0, 1), (5, 37), (64, 129)):
                assert torch.equal(computed(x[begin:end]), whole[begin:end]), (threads, end)


@pytest.mark.parametrize("n", [33, 250])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_order_of_additions_shows_in_a_trial(n: int, dtype: torch.dtype) -> None:
    """Though one in some thousand usual results differs at all, once rounded to 16 bits."""
    weight = torch.randn(2048, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    differ = []
    for x in rows._made_up(weight, 32):
        sums = x.double() @ weight[:, :1].double()
        rounding = 2**-24 * x.double().norm(dim=1, keepdim=True) * weight[:, :1].double().norm()
        differ.append(sums.to(dtype) != (sums + rounding).to(dtype))
    assert torch.stack(differ).double().mean() > 0.3


def made(name: str, dtype: torch.dtype, *, native: bool = False) -> LoadedModel:
    """A model that computes each row alike, by native code as far as it goes or by torch alone."""
    loaded = prepare(build(name).to(dtype))
    before = logits_of(loaded.model)
    optimize(loaded.model, compile=False, log=pytest.fail, native=native)
    assert invariant.repair(loaded.model, slowly=not native)
    assert difference(logits_of(loaded.model), before) < {4: 1e-5, 2: 0.1}[dtype.itemsize]
    return loaded


def check(loaded: LoadedModel, attention: str, varies: str | None = None) -> None:
    with rig(loaded, attention=attention) as r:
        assert r.varies == varies
        for threads, most in ((2, 256), (3, 29)):
            torch.set_num_threads(threads)
            invariance.check(loaded, r.executor, r.arena, most)
        check_arena(r.arena)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FEW, *OTHERS])
def test_models_with_native_code(name: str, dtype: torch.dtype) -> None:
    check(made(name, dtype, native=True), "native", VARYING.get(name))


@pytest.mark.parametrize("name", [*FEW, *OTHERS])
def test_models_with_torchs_operators(name: str) -> None:
    check(made(name, torch.float32), "tiled", VARYING.get(name))


@pytest.mark.parametrize("name", FEW)
def test_models_with_torchs_operators_in_half_precision(name: str) -> None:
    check(made(name, torch.bfloat16), "tiled")


def test_a_machine_without_a_compiler_can_be_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise CompileError("there is no compiler")

    monkeypatch.setattr(compiled, "load", load)
    monkeypatch.setattr(library, "_arithmetic", library._arithmetic.__wrapped__)
    loaded = prepare(build("gemma2-softcap"))
    with rig(loaded, attention="auto", deterministic=True) as r:
        assert r.kernels == ("tiled", "rows alike")
        assert r.varies is None
        invariance.check(loaded, r.executor, r.arena, 64)
    loaded = prepare(build("phimoe-window"))
    with (
        pytest.raises(
            EngineError, match="can't be guaranteed: torch's max in PhimoeRotaryEmbedding"
        ),
        rig(loaded, attention="auto", deterministic=True),
    ):
        pass


@pytest.mark.parametrize("name", FEW)
def test_tokens_do_not_depend_on_the_batch(name: str) -> None:
    loaded = made(name, torch.bfloat16)
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0)
    many = prompts()[:8]
    with rig(loaded, attention="tiled", max_num_batched_tokens=64) as r:
        together = outputs(run(r, many, params))
    torch.set_num_threads(1)
    with rig(loaded, attention="tiled", max_num_batched_tokens=23, max_num_seqs=1) as r:
        assert outputs(run(r, many, params)) == together


def test_what_depends_on_the_batch_is_named() -> None:
    loaded = prepare(build("gemma"))
    with rig(loaded) as r:
        assert r.varies == "the attention kernel sdpa depends on the batch"
    with rig(loaded, attention="tiled") as r:
        assert r.varies is not None
        assert r.varies.startswith("torch's linear in Linear")


class _Batched(SDPA):
    """Decodes depend on the longest one beside them."""

    invariant = True

    def run(self, layer, query, slots, new=None):  # type: ignore[no-untyped-def]
        out = super().run(layer, query, slots)
        return out * (1 + 1e-6 * len(self._segments))


def test_the_check_finds_what_is_only_measured() -> None:
    loaded = made("llama", torch.float32)
    with rig(loaded, attention="tiled") as r:
        r.executor.backend = _Batched()
        with pytest.raises(
            VariesError, match="a check found different logits where a prompt is split"
        ):
            invariance.check(loaded, r.executor, r.arena, 64)


def test_repairs_are_made_where_they_cost_little() -> None:
    """Without native code, only if asked for."""
    loaded = prepare(build("llama"))
    assert not invariant.repair(loaded.model, slowly=False)


def test_sums_over_other_dimensions() -> None:
    x = torch.randn(3, 5, 7)
    assert torch.equal(rows.by_rows(lambda: x.sum(-1))(), x.sum(-1))
    torch.testing.assert_close(rows.by_rows(lambda: x.sum(dim=[0, 1]))(), x.sum(dim=[0, 1]))
