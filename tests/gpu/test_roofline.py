"""The model of the least time: its arithmetic against counts made another way."""

from __future__ import annotations

import pytest

from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import Ceilings, Span, job_seconds, steps, work
from benchmarks.gpu.shapes import SHAPES, Load, build
from tests.test_docs import ROOT

SHAPE = SHAPES["toy"]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_count_the_parameters_of_the_real_modules(name: str) -> None:
    shape, model = SHAPES[name], build(SHAPES[name], "meta")
    linear = sum(p.numel() for n, p in model.named_parameters() if "_proj." in n)
    assert linear == shape.linear_params
    assert model.lm_head.weight.numel() == shape.head_params
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shape.tied
    assert model.dtype.itemsize == shape.dtype_bytes


def test_work_of_a_chunk_is_counted_pair_by_pair() -> None:
    found = work(SHAPE, [Span(5, 3), Span(9, 1)])
    pairs = sum(len(range(query + 1)) for query in (5, 6, 7, 9))
    each = 2 * SHAPE.head_dim * 2  # scores, then values: a multiply and an add per element
    assert found.attention_ops == pairs * each * SHAPE.q_heads * SHAPE.layers
    assert found.kv_bytes == (8 + 10) * 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4
    assert found.weight_bytes == 4 * (SHAPE.linear_params + SHAPE.head_params)
    assert found.linear_ops == 2 * (4 * SHAPE.linear_params + 2 * SHAPE.head_params)


def test_a_step_without_a_sample_reads_no_head() -> None:
    assert work(SHAPE, [Span(0, 8, sampled=False)]).weight_bytes == 4 * SHAPE.linear_params
    assert work(SHAPE, []).seconds(Ceilings(1, 1)) == 0


def test_seconds_are_bound_by_bytes_or_by_operations() -> None:
    decode = work(SHAPE, [Span(99, 1)])
    assert decode.seconds(Ceilings(1e9, 1e30)) == pytest.approx(decode.bytes / 1e9)
    assert decode.seconds(Ceilings(1e30, 1e9)) == pytest.approx(decode.ops / 1e9)


@pytest.mark.parametrize(("seqs", "chunk"), [(4, 16), (256, 8192), (3, 2), (1, 1000)])
def test_steps_compute_every_token_once_and_within_bounds(seqs: int, chunk: int) -> None:
    lengths = [(7, 3), (1, 1), (30, 9), (12, 12), (5, 2)]
    computed = sampled = 0
    for spans in steps(lengths, seqs, chunk):
        assert 0 < sum(s.length for s in spans) <= chunk
        assert len(spans) <= seqs
        computed += sum(s.length for s in spans)
        sampled += sum(s.sampled for s in spans)
    assert computed == sum(size + out - 1 for size, out in lengths)
    assert sampled == sum(out for _, out in lengths)


def test_a_job_takes_at_least_what_its_bytes_and_operations_take_alone() -> None:
    ceilings, lengths = Ceilings(1e9, 1e12), Load(requests=20).lengths()
    seconds = job_seconds(SHAPE, lengths, ceilings, max_num_seqs=8, max_num_batched_tokens=256)
    total = [work(SHAPE, spans) for spans in steps(lengths, 8, 256)]
    assert seconds >= sum(w.bytes for w in total) / 1e9
    faster = Ceilings(2e9, 2e12)
    half = job_seconds(SHAPE, lengths, faster, max_num_seqs=8, max_num_batched_tokens=256)
    assert half == pytest.approx(seconds / 2)


def test_the_load_is_nano_vllms() -> None:
    lengths = Load().lengths()
    assert len(lengths) == 256
    assert lengths == Load().lengths() != Load(seed=1).lengths()
    assert all(100 <= n <= 1024 for pair in lengths for n in pair)


def test_the_table_of_the_page_is_the_models() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    made = list(roofline.table(roofline.PUBLISHED))
    shown = page.split("<!-- roofline -->\n")[1].split("<!-- /roofline -->")[0].splitlines()
    assert shown == made, "run python -m benchmarks.gpu.roofline"
