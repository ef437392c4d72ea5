"""The CPU kernel against plain torch in float64, over slots at whose end memory ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from batchrun.allocator.arena import KVArena
from batchrun.allocator.host import HostMemory
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.tensor import layer_views
from batchrun.engine import attention
from batchrun.engine.attention import AttentionBackend, Geometry, LayerAttention, LayerSpec
from batchrun.engine.core import SamplingParams, Segment
from batchrun.engine.cpu import Level
from batchrun.engine.cpu import attention as native
from batchrun.engine.cpu import compile as compiled
from batchrun.engine.model.judge import check_kernel
from batchrun.engine.model.prepare import LoadedModel, prepare
from tests.attention.slots import segment
from tests.parity.models import build
from tests.parity.runner import generate, outputs, rig, run

CPU = torch.device("cpu")
PLAIN = LayerSpec(4, 2, 64, 64, 0.125)
LAYERS = {
    "grouped": PLAIN,
    "three to one": LayerSpec(9, 3, 64, 64, 0.125),
    "one key head": LayerSpec(7, 1, 80, 80, 0.11),
    "no groups": LayerSpec(3, 3, 128, 128, 0.09),
    "many to one": LayerSpec(40, 1, 32, 32, 0.18),
    "more heads than a task takes": LayerSpec(6, 6, 128, 128, 0.09),
    "wide": LayerSpec(2, 1, 256, 256, 0.06),
    "odd widths": LayerSpec(4, 4, 24, 12, 0.2),
    "window": replace(PLAIN, window=40),
    "window of one": replace(PLAIN, window=1),
    "window beyond all": replace(PLAIN, window=100_000),
    "chunks": replace(PLAIN, chunk=100),
    "chunks in a window": replace(PLAIN, chunk=300, window=150),
    "cap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, sinks=True),
    "everything": LayerSpec(6, 2, 40, 24, 0.3, window=300, softcap=5.0, sinks=True),
}
# Of values near 1, relative above it.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
KINDS = {
    "float32": (torch.float32, Level.NOTHING),
    "float16": (torch.float16, Level.NOTHING),
    "bfloat16 widened": (torch.bfloat16, Level.NOTHING),
    "bfloat16 by vectors": (torch.bfloat16, Level.VECTORS),
    "bfloat16 by tiles": (torch.bfloat16, Level.TILES),
}
HAS_COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")


def geometry(spec: LayerSpec, dtype: torch.dtype) -> Geometry:
    return Geometry((spec,), 1024, 8, 8, 1000, dtype, CPU)


def make(spec: LayerSpec, dtype: torch.dtype) -> AttentionBackend:
    return attention.create("native", geometry(spec, dtype))


def of_kind(spec: LayerSpec, kind: str) -> tuple[native.Native, torch.dtype]:
    """What computes so, and its dtype; skips the test where this CPU can't."""
    dtype, level = KINDS[kind]
    backend = native.make(geometry(spec, dtype), None, lambda line: None, level=level)
    if backend.level != level:
        pytest.skip(f"this CPU has no {level.name.lower()} of bfloat16")
    return backend, dtype


@contextmanager
def full_slots(
    spec: LayerSpec, dtype: torch.dtype, lengths: list[int], layers: int = 3
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a middle layer: a page behind each slot's last token there is nothing."""
    memory = HostMemory(4096)
    kv = LayerKV(spec.kv_heads, spec.k_dim, spec.v_dim)
    layout = KVLayout((kv,) * layers, dtype.itemsize, 4096, 1024, layers)
    arena = KVArena(memory, layout, num_slots=len(lengths))
    try:
        keys, values = layer_views(arena, layers // 2, dtype)
        for length in lengths:
            slot = arena.open()
            assert slot is not None
            assert arena.ensure(slot, length)
            keys[slot, :length].normal_()
            values[slot, :length].normal_()
        yield keys, values
    finally:
        arena.release()
        memory.close()


def expected(
    layer: LayerAttention, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """One query `[Hq, Dk]` over `[s, Hkv, D]`, in float64."""
    group = query.shape[0] // keys.shape[1]
    first = max(0, len(keys) - (layer.window or len(keys)))
    if layer.chunk:
        first = max(first, (len(keys) - 1) // layer.chunk * layer.chunk)
    keys, values = (t[first:].double().repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("hd,shd->hs", query.double(), keys) * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks.double()[:, None]], 1)
    weights = torch.softmax(scores, 1)[:, : len(keys)]
    return torch.einsum("hs,shd->hd", weights, values)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest: absolute for values up to 1, relative above, where roundings grow with them."""
    return float(((got.double() - want) / want.abs().clamp(min=1)).abs().max())


def asked(spec: LayerSpec) -> LayerAttention:
    sinks = torch.randn(spec.q_heads) if spec.sinks else None
    return LayerAttention(spec.scale, spec.window, spec.softcap, sinks, spec.chunk)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_decodes_are_right_up_to_the_last_byte_of_memory(name: str, dtype: torch.dtype) -> None:
    spec = LAYERS[name]
    rng = random.Random(name)
    backend, layer = make(spec, dtype), asked(spec)
    for _ in range(6):
        lengths = [rng.choice([1, 2, 31, 32, 33, 256, 257, rng.randint(1, 1000)]) for _ in range(5)]
        with full_slots(spec, dtype, lengths) as (keys, values):
            chosen = rng.sample(range(5), rng.randint(1, 5))
            query = torch.randn(spec.q_heads, len(chosen), spec.k_dim).to(dtype).transpose(0, 1)
            backend.plan([segment(slot, lengths[slot] - 1, 1) for slot in chosen])
            got = backend.run(layer, query, (keys, values))
            assert got.shape == (len(chosen), spec.q_heads, spec.v_dim)
            assert got.dtype == dtype
            for i, slot in enumerate(chosen):
                k, v = keys[slot, : lengths[slot]], values[slot, : lengths[slot]]
                want = expected(layer, query[i], k, v)
                assert difference(got[i], want) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_segments_are_right_up_to_the_last_byte_of_memory(name: str, kind: str) -> None:
    spec = LAYERS[name]
    rng = random.Random(name)
    (backend, dtype), layer = of_kind(spec, kind), asked(spec)
    for _ in range(3):
        lengths = [rng.choice([1, 2, 31, 32, 33, 256, 257, rng.randint(1, 1000)]) for _ in range(5)]
        with full_slots(spec, dtype, lengths) as (keys, values):
            chosen = rng.sample(range(5), rng.randint(1, 5))
            asks = {slot: rng.choice([1, rng.randint(1, lengths[slot])]) for slot in chosen}
            chosen.sort(key=lambda slot: asks[slot] > 1)
            query = torch.randn(spec.q_heads, sum(asks.values()), spec.k_dim)
            query = query.to(dtype).transpose(0, 1)
            backend.plan([segment(slot, lengths[slot] - asks[slot], asks[slot]) for slot in chosen])
            got, at = backend.run(layer, query, (keys, values)), 0
            for slot in chosen:
                for token in {0, asks[slot] - 1, *rng.choices(range(asks[slot]), k=10)}:
                    end = lengths[slot] - asks[slot] + token + 1
                    want = expected(layer, query[at + token], keys[slot, :end], values[slot, :end])
                    assert difference(got[at + token], want) < TOLERANCE[dtype]
                at += asks[slot]


def cuts(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """A sequence as segments: start and length of each."""
    at = [0]
    while at[-1] < length:
        at.append(min(length, at[-1] + rng.choice([1, 1, 2, 17, 63, 64, 100, rng.randint(1, 400)])))
    return [(begin, end - begin) for begin, end in pairwise(at)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_query_gets_the_same_bits_however_its_sequence_is_cut_and_batched(
    name: str, kind: str
) -> None:
    spec = LAYERS[name]
    rng = random.Random(name)
    (backend, dtype), layer = of_kind(spec, kind), asked(spec)
    lengths = [1000, 1, 257, 300, 640]
    threads = torch.get_num_threads()
    with full_slots(spec, dtype, lengths) as (keys, values):
        queries = [torch.randn(n, spec.q_heads, spec.k_dim).to(dtype) for n in lengths]

        def attend(segments: list[Segment]) -> list[torch.Tensor]:
            backend.plan(segments)
            asked = [queries[s.slot][s.start : s.start + s.length] for s in segments]
            return list(
                backend.run(layer, torch.cat(asked), (keys, values)).split([len(q) for q in asked])
            )

        whole = [attend([segment(slot, 0, n)])[0] for slot, n in enumerate(lengths)]
        left = [segment(slot, *cut) for slot, n in enumerate(lengths) for cut in cuts(rng, n)]
        left += [segment(0, at, 1) for at in (0, 31, 32, 255, 256, 511, 512, 999)]
        rng.shuffle(left)
        try:
            while left:
                torch.set_num_threads(rng.choice([1, 2, 3]))
                count = rng.randint(1, 12)
                step, left = sorted(left[:count], key=lambda s: s.length > 1), left[count:]
                for one, got in zip(step, attend(step), strict=True):
                    want = whole[one.slot][one.start : one.start + one.length]
                    assert torch.equal(got, want), (one.slot, one.start, one.length)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_what_decodes_have_in_common_is_read_once_and_changes_no_bit(name: str, kind: str) -> None:
    spec = LAYERS[name]
    (backend, dtype), layer = of_kind(spec, kind), asked(spec)
    lengths = [700, 1000, 513, 514, 300, 900, 900]
    # 1 begins with 600 tokens of 0, 2 with all of 0 but the last ones, 3 with 520 of 1; 6 is alone.
    inherited = {1: ((600, 0),), 2: ((512, 0),), 3: ((512, 0), (513, 1)), 4: ((299, 0),)}
    with full_slots(spec, dtype, lengths) as (keys, values):
        for slot, ranges in inherited.items():
            begin = 0
            for end, source in ranges:
                for tensor in (keys, values):
                    tensor[slot, begin:end] = tensor[source, begin:end]
                begin = end
        query = torch.randn(8 + 40, spec.q_heads, spec.k_dim).to(dtype)
        step = [segment(slot, lengths[slot] - 1, 1) for slot in (3, 0, 4, 6, 1, 2)]
        step += [segment(0, 650, 1), segment(3, 200, 1), segment(5, 860, 40)]
        rows = [query[i : i + 1] for i in range(8)] + [query[8:]]
        alone = []
        for one, row in zip(step, rows, strict=True):
            backend.plan([one])
            alone.append(backend.run(layer, row, (keys, values)))
        for one in step:
            one.key, one.inherited = one.slot, inherited.get(one.slot, ())
        backend.plan(step)
        got = backend.run(layer, query, (keys, values))  # what fails is shown, and keys can't be
        assert torch.equal(got, torch.cat(alone))
        limited = spec.window or spec.chunk
        if not limited and spec.q_heads < 40 * spec.kv_heads:  # one task for all
            for slot in (0, 1, 2, 4):  # 3 comes first: who has the same reads it there
                keys[slot, :256], values[slot, :256] = torch.nan, torch.nan
            got = backend.run(layer, query, (keys, values))
            assert torch.equal(got, torch.cat(alone))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_mixed_step(dtype: torch.dtype) -> None:
    lengths = [300, 17, 129, 64]
    with full_slots(PLAIN, dtype, lengths) as (keys, values):
        steps: list[list[Segment]] = [
            [segment(0, 299, 1), segment(2, 20, 1), segment(1, 0, 17), segment(3, 10, 54)],
            [segment(1, 3, 14), segment(0, 30, 1)],
            [segment(0, 0, 300)],
        ]
        backend, layer = make(PLAIN, dtype), asked(PLAIN)
        for segments in steps:
            query = torch.randn(sum(s.length for s in segments), 4, 64).to(dtype)
            backend.plan(segments)
            got, at = backend.run(layer, query, (keys, values)), 0
            for one in segments:
                for token in range(one.start, one.start + one.length):
                    k, v = keys[one.slot, : token + 1], values[one.slot, : token + 1]
                    want = expected(layer, query[at], k, v)
                    assert difference(got[at], want) < TOLERANCE[dtype]
                    at += 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16 by vectors"])
@pytest.mark.parametrize("name", ["three to one", "odd widths", "window"])
def test_new_keys_and_values_are_put_in_place_first(name: str, kind: str, threads: int) -> None:
    spec, before = LAYERS[name], torch.get_num_threads()
    (backend, dtype), layer = of_kind(spec, kind), asked(spec)
    lengths = [1, 40, 257, 300, 513, 1000]
    torch.set_num_threads(threads)
    try:
        with full_slots(spec, dtype, lengths) as (keys, values):
            step = [
                segment(slot, lengths[slot] - new, new)
                for slot, new in ((0, 1), (2, 1), (4, 1), (1, 40), (3, 7), (5, 290))
            ]
            tokens = sum(s.length for s in step)
            # As a layer's one product has them: between queries, and heads before tokens.
            heads = spec.q_heads + 2 * spec.kv_heads
            made = torch.randn(tokens, heads, max(spec.k_dim, spec.v_dim)).to(dtype)
            query, key, value = made.split([spec.q_heads, spec.kv_heads, spec.kv_heads], 1)
            query, key, value = (
                query[..., : spec.k_dim],
                key[..., : spec.k_dim],
                value[..., : spec.v_dim],
            )
            backend.plan(step)
            got = backend.run(layer, query, (keys, values), (key, value))
            at = 0
            for s in step:
                end = s.start + s.length
                assert torch.equal(keys[s.slot, s.start : end], key[at : at + s.length])
                assert torch.equal(values[s.slot, s.start : end], value[at : at + s.length])
                at += s.length
            assert torch.equal(backend.run(layer, query, (keys, values)), got)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_large_scores_and_what_is_no_number(dtype: torch.dtype) -> None:
    with full_slots(PLAIN, dtype, [50]) as (keys, values):
        backend, layer = make(PLAIN, dtype), asked(PLAIN)
        backend.plan([segment(0, 49, 1)])
        query = (torch.randn(1, 4, 64) * 1000).to(dtype)
        want = expected(layer, query[0], keys[0, :50], values[0, :50])
        got = backend.run(layer, query, (keys, values))
        close = 1e-4 if dtype == torch.float32 else 2 * TOLERANCE[dtype]
        torch.testing.assert_close(got[0].double(), want, rtol=close, atol=close)
        keys[0, 7, 0, 3] = torch.nan
        got = backend.run(layer, query, (keys, values))
        assert got[0, :2].isnan().all()
        assert not got[0, 2:].isnan().any()


@cache
def loaded(name: str) -> LoadedModel:
    return prepare(build(name))


@pytest.mark.parametrize(
    "name", ["llama", "gemma2-softcap", "gpt-oss-sinks", "mistral-window", "deepseek-mla", "phi3"]
)
@pytest.mark.parametrize("chunk", [256, 13])
def test_greedy_equals_generate(name: str, chunk: int) -> None:
    rng = random.Random(8)
    lengths = [1, 2, 5, 12, 33, 60, 3, 7]
    prompts = [[rng.randrange(3, 199) for _ in range(length)] for length in lengths]
    with rig(loaded(name), attention="native", max_num_batched_tokens=chunk) as made:
        assert made.executor.backend.name == "native"
        done = run(made, prompts, SamplingParams(max_tokens=14))
    assert outputs(done) == [generate(loaded(name).model, prompt, 14) for prompt in prompts]


def test_auto_takes_it_and_doctor_finds_it_right() -> None:
    for dtype in TOLERANCE:
        assert attention.create("auto", geometry(PLAIN, dtype)).name == "native"
        works, what = check_kernel("native", CPU, dtype)
        assert works, what
    double = geometry(PLAIN, torch.float64)
    lines: list[str] = []
    assert attention.create("auto", double, None, lines.append).name == "sdpa"
    assert lines == [
        "using sdpa attention (native: it computes in float32 and narrower, not in float64)"
    ]


def empty_cache(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", str(folder))


def test_without_a_compiler_sdpa_computes_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty_cache(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    lines: list[str] = []
    made = attention.create("auto", geometry(PLAIN, torch.float32), None, lines.append)
    assert made.name == "sdpa"
    reason = "it can't be compiled: there is no C++ compiler (g++ or c++)"
    assert lines == [f"using sdpa attention (native: {reason})"]
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        make(PLAIN, torch.float32)
    assert check_kernel("native", CPU, torch.float32) == (False, f"it fails: {reason}")


def test_a_compiler_that_fails_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty_cache(monkeypatch, tmp_path)
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'in a file:' >&2; echo 'error: no such thing' >&2; exit 1")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ValueError, match="it can't be compiled: error: no such thing"):
        make(PLAIN, torch.float32)
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_that_is_damaged_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    empty_cache(monkeypatch, tmp_path)
    path = compiled.build(native.SOURCE, dtype="float32")
    path.unlink()
    path.write_bytes(b"")
    lines: list[str] = []
    made = attention.create("native", geometry(PLAIN, torch.float32), None, lines.append)
    assert made.name == "native"
    assert len(lines) == 1


def _build(folder: str) -> tuple[list[str], str]:
    os.environ["XDG_CACHE_HOME"] = folder
    lines: list[str] = []
    path = compiled.build(native.SOURCE, lines.append, "float32")
    ctypes.CDLL(str(path))
    return lines, path.name


def test_two_processes_that_build_at_once_compile_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        found = list(pool.map(_build, [str(tmp_path)] * 2))
    assert len({name for _, name in found}) == 1
    assert sum(len(lines) for lines, _ in found) == 1
    assert [path.suffix for path in sorted((tmp_path / "batchrun").iterdir())] == [".lock", ".so"]
