"""The vAttention paper's Table 8 (arXiv 2405.04437, section 7.4), for its layout and for ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.report.text import size


@dataclass(frozen=True)
class Shape:
    """A decoder's KV cache in 16-bit elements."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int = 128


SHAPES = (Shape("Yi-6B", 32, 4), Shape("Llama-3-8B", 32, 8), Shape("Yi-34B", 60, 8))
"""The models of the table."""


@dataclass(frozen=True)
class WorstCase:
    """A cell of Table 8: what pages of one size mean for a request under one layout.

    Attributes:
        page_size: in bytes.
        interleaved: all layers' K and V lie in one slab; otherwise each is a tensor of its own.
        tokens_per_page: the block size; not whole in general.
        waste: bytes of the last pages, on all GPUs together. The paper counts them as wholly lost;
            they hold one token at least.
    """

    model: str
    tensor_parallel: int
    page_size: int
    interleaved: bool
    tokens_per_page: float
    waste: int


def worst_case(shape: Shape, tensor_parallel: int, page_size: int, interleaved: bool) -> WorstCase:
    """Block size and waste of a model whose heads are split over `tensor_parallel` GPUs."""
    heads = shape.kv_heads // tensor_parallel
    # A tensor of its own, K or V, is a layer that has no V, in a slab of its own.
    count, v_dim = (shape.layers, shape.head_dim) if interleaved else (2 * shape.layers, 0)
    layers = (LayerKV(heads, shape.head_dim, v_dim),) * count
    layout = KVLayout(layers, 2, page_size, 1, count if interleaved else 1)
    return WorstCase(
        shape.name,
        tensor_parallel,
        page_size,
        interleaved,
        page_size / layout.group_bytes_per_token(0),
        tensor_parallel * layout.num_groups * page_size,
    )


def table8() -> list[WorstCase]:
    """Every cell: pages of 64 KiB to 2 MiB, per layer and interleaved, on one and on two GPUs."""
    return [
        worst_case(shape, tensor_parallel, page_size << 10, interleaved)
        for interleaved in (False, True)
        for shape in SHAPES
        for tensor_parallel in (1, 2)
        for page_size in (64, 128, 256, 2048)
    ]


def render(cells: Iterable[WorstCase]) -> str:
    """Table 8 as text: for each layout and page size, tokens a page and MiB a request may waste."""
    rows: dict[tuple[bool, str], dict[int, WorstCase]] = {}
    for cell in cells:
        name = f"{cell.model} TP-{cell.tensor_parallel}"
        rows.setdefault((cell.interleaved, name), {})[cell.page_size] = cell
    lines = ["tokens a page | MiB that a request can waste, on all its GPUs"]
    for interleaved, title in ((False, "K and V of each layer apart"), (True, "all interleaved")):
        chosen = {name: row for (kind, name), row in rows.items() if kind is interleaved}
        pages = next(iter(chosen.values()))
        lines += ["", f"{title:<28}" + "".join(f"{size(page):>18}" for page in pages)]
        for name, row in chosen.items():
            shown = (f"{c.tokens_per_page:.4g} | {c.waste / 2**20:.4g}" for c in row.values())
            lines.append(f"  {name:<26}" + "".join(f"{text:>18}" for text in shown))
    return "\n".join(lines)
