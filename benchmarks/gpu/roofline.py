"""The least time that a step can take on a machine with measured ceilings. Pure arithmetic.

The model is written out in docs/performance.md, whose table this module prints:

    python -m benchmarks.gpu.roofline
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu.shapes import SHAPES, Load, Shape


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do: bytes a second copied, bf16 operations a second."""

    bandwidth: float
    matrix: float


PUBLISHED = Ceilings(bandwidth=4.3e12, matrix=790e12)
"""Of one H200, measured elsewhere; a check measures its own."""


@dataclass(frozen=True)
class Work:
    """What a step must do at least. Operations count a multiply-add as two."""

    weight_bytes: int = 0
    linear_ops: int = 0
    kv_bytes: int = 0
    attention_ops: int = 0

    @property
    def bytes(self) -> int:
        """Weights and keys and values read once."""
        return self.weight_bytes + self.kv_bytes

    @property
    def ops(self) -> int:
        """Operations of the matrices and of attention."""
        return self.linear_ops + self.attention_ops

    def seconds(self, ceilings: Ceilings) -> float:
        """The matrices, then attention, each bound by its bytes or by its operations."""
        bandwidth, matrix = ceilings.bandwidth, ceilings.matrix
        linear = max(self.weight_bytes / bandwidth, self.linear_ops / matrix)
        return linear + max(self.kv_bytes / bandwidth, self.attention_ops / matrix)


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of a sequence, computed in one step."""

    start: int
    length: int
    sampled: bool = True


def work(shape: Shape, spans: Iterable[Span]) -> Work:
    """What one step over `spans` must do."""
    spans = list(spans)
    tokens = sum(s.length for s in spans)
    sampled = sum(s.sampled for s in spans)
    # Query i of a span sees the start + i + 1 tokens up to itself.
    pairs = sum(s.length * s.start + s.length * (s.length + 1) // 2 for s in spans)
    head = shape.head_params if sampled else 0
    return Work(
        weight_bytes=(shape.linear_params + head) * shape.dtype_bytes if spans else 0,
        linear_ops=2 * shape.linear_params * tokens + 2 * head * sampled,
        kv_bytes=sum(s.start + s.length for s in spans) * shape.kv_bytes_per_token,
        attention_ops=4 * shape.layers * shape.q_heads * shape.head_dim * pairs,
    )


def steps(
    lengths: Sequence[tuple[int, int]], max_num_seqs: int, max_num_batched_tokens: int
) -> Iterator[list[Span]]:
    """The steps of continuous batching over requests of (tokens in, tokens out).

    Every running sequence gets its next token first; what is left of the step's tokens goes to
    prompts, in order. The last token out is never computed itself.
    """
    waiting = deque(lengths)
    running: list[list[int]] = []  # tokens in, tokens out, tokens computed
    while waiting or running:
        spans: list[Span] = []
        room = max_num_batched_tokens
        while len(running) < max_num_seqs and waiting:
            running.append([*waiting.popleft(), 0])
        for sequence in sorted(running, key=lambda s: s[2] < s[0]):
            size, _, done = sequence
            length = min(max(size - done, 1), room)
            if length:
                spans.append(Span(done, length, sampled=done + length >= size))
                sequence[2] += length
                room -= length
        yield spans
        running = [s for s in running if s[2] < s[0] + s[1] - 1]


def job_seconds(
    shape: Shape,
    lengths: Sequence[tuple[int, int]],
    ceilings: Ceilings,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> float:
    """The least time for all the requests."""
    planned = steps(lengths, max_num_seqs, max_num_batched_tokens)
    return sum(work(shape, spans).seconds(ceilings) for spans in planned)


def table(ceilings: Ceilings) -> Iterator[str]:
    """The Markdown table of docs/performance.md."""
    columns = (
        "model",
        "decode step, 256 at 1,024 tokens",
        "tokens/s",
        "prefill tokens/s, chunks of 8,192",
        "256 requests, 100-1024 in and out",
        "output tokens/s",
    )
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|"
    lengths = Load().lengths()
    for shape in SHAPES.values():
        if shape.name == "toy":
            continue
        decode = work(shape, [Span(1023, 1)] * 256).seconds(ceilings)
        chunk = work(shape, [Span(0, 1024)] * 8).seconds(ceilings)
        job = job_seconds(shape, lengths, ceilings, max_num_seqs=256, max_num_batched_tokens=8192)
        out = sum(n for _, n in lengths)
        yield (
            f"| {shape.name} | {decode * 1e3:.1f} ms | {256 / decode:,.0f} | {8192 / chunk:,.0f} "
            f"| {job:.1f} s | {out / job:,.0f} |"
        )


if __name__ == "__main__":
    print("\n".join(table(PUBLISHED)))
