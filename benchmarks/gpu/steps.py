"""Decode steps, prefill chunks and chats through the engine: Llama-3-8B's shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun.engine.build import Assembly
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.model.prepare import prepare
from batchrun.engine.settings import Settings
from benchmarks.gpu import roofline
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.roofline import Span
from benchmarks.gpu.shapes import Shape, build, chats, prompt

if TYPE_CHECKING:
    from batchrun.engine.build import Assembly


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Prefill first, which warms up what decode needs too."""
    shape = bench.shape("llama-3-8b")
    chunk, size = bench.size(8192, 64), bench.size(1024, 32)
    began = time.perf_counter()
    with assembled(
        bench,
        shape,
        max_num_seqs=bench.size(512, 16),
        max_num_batched_tokens=chunk,
        max_model_len=bench.size(2048, 128),
    ) as assembly:
        yield {"shape": shape.name, "ready_s": time.perf_counter() - began}
        yield prefill(bench, assembly, shape, chunk, size)
        yield decode(bench, assembly, shape, size)
        found: list[dict[str, Any]] = []
        for seqs in (bench.size(256, 8), bench.size(512, 16)):
            found.append(chatting(bench, assembly, shape, seqs))
            yield {"chats": found}


@contextmanager
def assembled(
    bench: Bench, shape: Shape, *, log: Any = print, **settings: Any
) -> Iterator[Assembly]:
    """An engine over a model of that shape, on the bench's device; a token a row and step."""
    loaded = prepare(build(shape, bench.device), max_model_len=settings.get("max_model_len"))
    with tempfile.TemporaryDirectory() as cache:
        chosen = {"device": bench.device, "attention": bench.attention, "drafts": False} | settings
        wanted = Settings("", shape.name, shape.name, Path(cache), **chosen)
        with Assembly(loaded, wanted, print) as assembly:
            yield assembly


def add(
    assembly: Assembly, shape: Shape, lengths: Sequence[tuple[int, int]], *, first: int = 0
) -> None:
    """Queue requests of (tokens in, tokens out), greedy and never ended by an end token.

    Those of the same row, counted from `first`, begin alike.
    """
    for row, (size, out) in enumerate(lengths, first):
        params = SamplingParams(max_tokens=out, ignore_eos=True)
        assembly.engine.add(Request(row, 0, prompt(size, shape.vocab, row), params, 0))


def drain(assembly: Assembly) -> int:
    """Step until nothing is left; returns the tokens that came out."""
    tokens = 0
    while assembly.engine.has_work:
        for completion in assembly.engine.step():
            if completion.error is not None:
                raise RuntimeError(f"row {completion.request.row}: {completion.error}")
            tokens += len(completion.token_ids)
    return tokens


def measured(
    bench: Bench, assembly: Assembly, shape: Shape, lengths: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """A job of requests of (tokens in, tokens out) through an idle engine.

    Raises:
        RuntimeError: Other tokens came out than were asked for.
    """
    before = assembly.measurements()
    add(assembly, shape, lengths)
    bench.synchronise()
    began = time.perf_counter()
    tokens = drain(assembly)
    bench.synchronise()
    seconds = time.perf_counter() - began
    after = assembly.measurements()
    gone = {k: v - before[k] for k, v in after.items() if isinstance(v, float | int)}
    wanted = sum(out for _, out in lengths)
    if tokens != wanted:
        raise RuntimeError(f"{tokens} tokens came out, {wanted} were asked for")
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "steps": gone["steps"],
        "exposed": gone["map_exposed_s"] / seconds,
        "hidden": gone["map_hidden_s"] / seconds,
        "stalls": gone["map_stalls"],
        "utilisation": gone["kv_live_s"] / gone["kv_mapped_s"],
        "idle": gone["idle_s"] / seconds,
        "device_s": gone["device_s"],
        "preemptions": gone["preemptions"],
        "recomputed": gone["recomputed_tokens"],
    }


def prefill(
    bench: Bench, assembly: Assembly, shape: Shape, chunk: int, size: int
) -> dict[str, Any]:
    """Prompts that fill whole chunks and want one token each."""
    each = chunk // size
    lengths = [(size, 1)] * (each * bench.size(16, 3))
    add(assembly, shape, lengths[: 2 * each])
    drain(assembly)
    add(assembly, shape, lengths)
    bench.synchronise()
    began = time.perf_counter()
    drain(assembly)
    bench.synchronise()
    seconds = time.perf_counter() - began
    planned = roofline.steps(lengths, each, chunk)
    return {
        "prefill_tokens": size * len(lengths),
        "prefill_ops": sum(roofline.work(shape, spans).ops for spans in planned),
        "prefill_s": seconds,
    }


def decode(bench: Bench, assembly: Assembly, shape: Shape, context: int) -> dict[str, Any]:
    """Steps in which every sequence gets one token, `context` tokens long on average."""
    engine, scheduler = assembly.engine, assembly.scheduler
    warm, count, seqs = bench.size(16, 2), bench.size(96, 4), bench.size(256, 8)
    start = context - warm - count // 2
    # While the last prompts are computed the first sequences decode already.
    early = -(-start * seqs // scheduler.max_num_batched_tokens)
    add(assembly, shape, [(start, 2 * early + warm + count + 4)] * seqs)
    while scheduler.waiting or any(s.num_computed_tokens < start for s in scheduler.running):
        engine.step()
    for _ in range(warm):
        engine.step()
    # No synchronisation here: it would empty the pipeline that is measured.
    before, tokens_before = _clocks(assembly), _tokens(assembly)
    for _ in range(count):
        engine.step()
    after, tokens_after = _clocks(assembly), _tokens(assembly)
    steps, wall, device, idle = (b - a for a, b in zip(before, after, strict=True))
    tokens = (tokens_before + tokens_after) / 2
    if len(scheduler.running) < seqs:
        raise RuntimeError(f"{seqs - len(scheduler.running)} sequences ended too early")
    drain(assembly)
    weights = roofline.work(shape, [Span(0, 1)]).weight_bytes
    return {
        "decode_sequences": seqs,
        "decode_context": tokens / seqs,
        "decode_bytes": weights + tokens * shape.kv_bytes_per_token,
        "decode_step_s": wall / steps,
        "decode_device_s": device / steps,
        # A CPU has no device to idle.
        "decode_idle": idle / (device + idle) if device else 0.0,
    }


def chatting(bench: Bench, assembly: Assembly, shape: Shape, seqs: int) -> dict[str, Any]:
    """A job of requests as long as chats are, `seqs` at a time, after a small one like it."""
    assembly.scheduler.max_num_seqs = seqs
    lengths = chats(bench.size(1000, 24), longest=bench.size(1024, 32))
    small = [(size, min(out, 32)) for size, out in lengths[: 2 * seqs]]
    add(assembly, shape, small, first=len(lengths))
    drain(assembly)
    asked = {"requests": len(lengths), "prompt_tokens": sum(size for size, _ in lengths)}
    return {"sequences": seqs} | asked | measured(bench, assembly, shape, lengths)


def _clocks(assembly: Assembly) -> tuple[float, ...]:
    stats = assembly.engine.stats
    return stats.steps, time.perf_counter(), stats.device_s, stats.idle_s


def _tokens(assembly: Assembly) -> int:
    return sum(s.num_tokens for s in assembly.scheduler.running)
