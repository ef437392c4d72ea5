"""SDPA with decodes put together and queries in blocks: right, bounded, and not a token too far."""

from __future__ import annotations

import random
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batchrun.engine.attention import LayerAttention, LayerSpec, explicit, gathered, sdpa
from batchrun.engine.attention.gathered import Decodes, _groups
from batchrun.engine.attention.sdpa import SDPA
from batchrun.engine.core import SamplingParams, Segment
from batchrun.engine.model.prepare import prepare
from tests.attention.slots import segment, upload
from tests.attention.test_native import asked, difference, expected, full_slots
from tests.parity.models import build
from tests.parity.runner import generate, outputs, rig, run

PLAIN = LayerSpec(4, 2, 64, 64, 0.125)
LAYERS = {
    "grouped": PLAIN,
    "no groups": LayerSpec(3, 3, 32, 32, 0.2),
    "mla": LayerSpec(4, 4, 24, 16, 0.2),
    "odd widths": LayerSpec(4, 4, 24, 12, 0.2),
    "window": replace(PLAIN, window=40),
    "window of one": replace(PLAIN, window=1),
    "window beyond all": replace(PLAIN, window=100_000),
    "chunks": replace(PLAIN, chunk=48),
    "chunks of one": replace(PLAIN, chunk=1),
    "chunks beyond all": replace(PLAIN, chunk=100_000),
    "chunks, cap and sinks": replace(PLAIN, chunk=37, softcap=2.0, sinks=True),
    "cap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, sinks=True),
    "everything": LayerSpec(6, 2, 40, 24, 0.3, window=300, softcap=5.0, sinks=True),
}
# In plain torch scores are rounded to bfloat16, as in transformers.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.04}
SMALL = {"whole": {}, "blocks": {"SCORES": 1 << 12, "NUMBERS": 1 << 17}}


@pytest.fixture(params=SMALL)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds as they are, and so small that every case meets them."""
    small = SMALL[request.param]
    if small:
        monkeypatch.setattr(explicit, "SCORES", small["SCORES"])
        monkeypatch.setattr(gathered, "NUMBERS", small["NUMBERS"])


def steps(rng: random.Random) -> list[Segment]:
    """Decodes of any lengths, then a chunk, a whole prompt and a decode behind them."""
    decodes = [segment(i, rng.choice([0, 1, 15, 16, rng.randint(0, 700)]), 1) for i in range(9)]
    start, length = rng.randint(1, 300), rng.randint(2, 300)
    return [*decodes, segment(9, start, length), segment(10, 0, length), segment(11, 70, 1)]


def worst(
    backend: SDPA,
    layer: LayerAttention,
    segments: list[Segment],
    query: torch.Tensor,
    views: tuple[torch.Tensor, torch.Tensor],
) -> float:
    """The largest difference from float64, of some queries of each segment."""
    backend.plan(segments)
    got = backend.run(layer, query, views)
    at, found = 0, []
    for one in segments:
        for i in {*range(0, one.length, 13), one.length - 1}:
            k, v = (view[one.slot, : one.start + i + 1] for view in views)
            want = expected(layer, query[at + i], k, v)
            found.append(difference(got[at + i], want))
        at += one.length
    assert at == len(got)
    return max(found)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_every_query_is_right_up_to_the_last_byte_of_memory(
    name: str, dtype: torch.dtype, batched: bool
) -> None:
    spec, rng = LAYERS[name], random.Random(name)
    segments = steps(rng)
    lengths = [s.start + s.length for s in segments]
    query = torch.randn(spec.q_heads, sum(s.length for s in segments), spec.k_dim).to(dtype)
    with full_slots(spec, dtype, lengths) as views:
        backend = SDPA(upload, batched=batched)
        found = worst(backend, asked(spec), segments, query.transpose(0, 1), views)
    assert found <= TOLERANCE[dtype]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_what_lies_behind_an_end_never_counts(name: str, batched: bool) -> None:
    spec, segments = LAYERS[name], steps(random.Random(3))
    ends = [s.start + s.length for s in segments]
    layer = asked(spec)
    query = torch.randn(spec.q_heads, sum(s.length for s in segments), spec.k_dim).transpose(0, 1)
    found = []
    with full_slots(spec, torch.float32, [end + 40 for end in ends]) as views:
        for poison in (0.0, torch.nan, torch.inf):
            for view in views:
                for slot, end in enumerate(ends):
                    view[slot, end : end + 40] = poison
            backend = SDPA(batched=batched)
            backend.plan(segments)
            found.append(backend.run(layer, query, views))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


class Held(TorchDispatchMode):
    """Bytes of what operators return, while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def peak(spec: LayerSpec, segments: list[Segment], *, batched: bool) -> int:
    """Bytes that a layer holds at most, beside queries, outputs, keys and values."""
    tokens = sum(s.length for s in segments)
    end = max(s.start + s.length for s in segments)
    query = torch.randn(tokens, spec.q_heads, spec.k_dim)
    keys = torch.randn(len(segments), end, spec.kv_heads, spec.k_dim)
    values = torch.randn(len(segments), end, spec.kv_heads, spec.v_dim)
    backend, layer = SDPA(batched=batched), asked(spec)
    backend.plan(segments)
    with Held() as held:
        out = backend.run(layer, query, (keys, values))
    # A call's queries, and what it returns before it is copied to its place.
    return held.peak - 2 * out.nbytes - query.nbytes


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("start", "length"), [(0, 1024), (1536, 512)])
def test_prompts_are_bounded_whatever_their_length(
    name: str, start: int, length: int, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explicit, "SCORES", 1 << 15)
    if batched and name == "mla":
        pytest.skip("its keys and values, of two widths, only a GPU takes by tiles")
    spec = LAYERS[name]
    found = peak(spec, [segment(0, start, length)], batched=batched)
    # Two copies of the scores, and flags beside them. Unbounded they would be 8 MiB and more.
    assert found <= 3 * 4 * (1 << 15)


@pytest.mark.parametrize("name", LAYERS)
def test_decodes_are_bounded_however_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LAYERS[name]
    numbers = spec.kv_heads * (spec.k_dim + spec.v_dim)
    monkeypatch.setattr(gathered, "NUMBERS", 2048 * numbers)
    monkeypatch.setattr(explicit, "SCORES", 1 << 16)
    segments = [segment(i, 500 + i, 1) for i in range(32)]
    found = peak(spec, segments, batched=True)
    # Keys and values once; scores, which are fewer; and an index and a flag for each token of all.
    assert found <= 2 * 4 * 2048 * numbers + 32 * 544 * 32


def test_the_measure_of_memory_sees_what_is_held_together() -> None:
    with Held() as held:
        x = torch.ones(1000)
        y = x + 1
        del x
        z = y.view(10, 100).mul_(2).exp()
    assert (held.peak, held.bytes) == (8000, 8000)
    assert z.shape == (10, 100)


def test_decodes_together_are_of_similar_lengths_and_few_enough() -> None:
    rng = random.Random(0)
    for _ in range(200):
        used = np.array([rng.choice([1, 40, 300, rng.randint(1, 9000)]) for _ in range(50)])
        groups = _groups(used.astype(np.int32), 20_000)
        for group in groups:
            longest = -(-int(used[group].max()) // 16) * 16
            assert len(group) > 1
            assert len(group) * longest <= 20_000
            assert longest <= 256 or used[group].min() >= longest // 2
        members = [int(i) for group in groups for i in group]
        assert len(members) == len(set(members))


def test_layers_alike_share_what_a_step_gathers_by() -> None:
    decodes = Decodes([segment(0, 9, 1), segment(1, 12, 1)], upload)
    whole, window = LayerAttention(0.1), LayerAttention(0.1, window=4)
    assert decodes.buckets(whole, 64, 8) is decodes.buckets(LayerAttention(0.2), 64, 8)
    assert decodes.buckets(window, 64, 8) is not decodes.buckets(whole, 64, 8)
    (bucket,), done = decodes.buckets(window, 64, 8)
    assert done == {0, 1}
    assert bucket.members.tolist() == [0, 1]
    assert bucket.rows.tolist() == [[6, 7, 8, *[9] * 13], [73, 74, 75, *[76] * 13]]
    assert bucket.seen.sum(1).tolist() == [4, 4]
    (bucket,), done = decodes.buckets(LayerAttention(0.1, chunk=10), 64, 8)
    assert done == {0, 1}
    assert bucket.seen.sum(1).tolist() == [10, 3]
    assert bucket.rows[1].tolist() == [74, 75, *[76] * 14]


@pytest.mark.parametrize(
    "name", ["llama", "gemma2-softcap", "gpt-oss-sinks", "mistral-window", "deepseek-mla"]
)
def test_greedy_equals_generate_as_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "make", lambda _, upload, *rest: SDPA(upload, batched=True))
    rng, loaded = random.Random(8), prepare(build(name))
    prompts = [[rng.randrange(3, 199) for _ in range(n)] for n in (1, 2, 5, 12, 33, 60, 3, 7)]
    with rig(loaded, attention="sdpa", max_num_batched_tokens=13) as made:
        done = run(made, prompts, SamplingParams(max_tokens=14))
    assert outputs(done) == [generate(loaded.model, prompt, 14) for prompt in prompts]
