"""The figures of a check beside their targets. Pure: from the parts' records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.roofline import Ceilings, job_seconds
from benchmarks.gpu.shapes import SHAPES, Load


@dataclass(frozen=True)
class Row:
    """One figure. `met` is None where there is no target, no value, or only a rehearsal."""

    figure: str
    shown: str
    target: str
    value: float | None = None
    met: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Figures:
    """The parts' figures by name; what is missing says why."""

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        self._parts = parts

    def get(self, part: str, *names: str) -> list[float] | str:
        """The values, or the reason that there are none."""
        record = self._parts.get(part)
        if record is None:
            return f"{part} was not run"
        found = [record["figures"].get(name) for name in names]
        if None in found:
            reason = record.get("reason") or f"{part} has no {names[found.index(None)]}"
            return f"{part} {record['status']}: {reason}"
        return [float(value) for value in found if value is not None]


def rows(parts: Mapping[str, Mapping[str, Any]], *, toy: bool) -> list[Row]:
    """Every figure that has a target, in the order of the table in docs/performance.md."""
    figures = Figures(parts)
    return [row if not toy else _unjudged(row) for row in _rows(figures, parts)]


def _rows(figures: Figures, parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    bandwidth = figures.get("ceilings", "bandwidth")
    matrix = figures.get("ceilings", "matrix")
    decode = figures.get("steps", "decode_bytes", "decode_step_s")
    yield _row(
        "decode step: (weights + KV) / bandwidth, over its time",
        _ratio(decode, bandwidth, lambda d, b: d[0] / b[0] / d[1]),
        0.80,
    )
    prefill = figures.get("steps", "prefill_ops", "prefill_s")
    yield _row(
        "prefill: operations / matrix rate, over its time",
        _ratio(prefill, matrix, lambda p, m: p[0] / m[0] / p[1]),
        0.65,
    )
    yield _row(
        "GPU idle between steps, steady decode",
        _ratio(figures.get("steps", "decode_idle"), [], lambda d, _: d[0]),
        0.02,
        below=True,
        percent=True,
    )
    for name, label, target in (
        ("exposed", "exposed mapping, whole job", 0.005),
        ("exposed_without_overlap", "the same without overlap", None),
    ):
        share = _ratio(figures.get("job", name), [], lambda d, _: d[0])
        yield _row(label, share, target, below=True, percent=True)
    yield _row(
        "live / mapped KV, averaged over time",
        _ratio(figures.get("job", "utilisation"), [], lambda d, _: d[0]),
        0.95,
    )
    ours = figures.get("job", "tokens_per_s")
    peer = figures.get("peer", "tokens_per_s")
    yield _row(
        "end to end, times generate_batch",
        _ratio(ours, peer, lambda a, b: a[0] / b[0]),
        3.0,
        note=_peer_note(parts),
    )
    if parts.get("vllm", {}).get("figures", {}).get("tokens_per_s"):
        theirs = figures.get("vllm", "tokens_per_s")
        yield _row("end to end, times vLLM", _ratio(ours, theirs, lambda a, b: a[0] / b[0]), None)
    seconds, ceilings = (
        figures.get("job", "seconds"),
        figures.get("ceilings", "bandwidth", "matrix"),
    )
    yield _row(
        "end to end, of the roofline",
        _ratio(seconds, ceilings, lambda s, c: _least_seconds(parts, Ceilings(*c)) / s[0]),
        0.70,
    )


def _ratio(first: Any, second: Any, of: Any) -> float | str:
    for found in (first, second):
        if isinstance(found, str):
            return found
    return float(of(first, second))


def _row(
    figure: str,
    value: float | str,
    target: float | None,
    *,
    below: bool = False,
    percent: bool = False,
    note: str = "",
) -> Row:
    def show(number: float) -> str:
        return f"{number:.2%}" if percent else f"{number:.2f}"

    wanted = "" if target is None else f"{'at most' if below else 'at least'} {show(target)}"
    if isinstance(value, str):
        return Row(figure, f"none: {value}", wanted)
    met = None if target is None else (value <= target if below else value >= target)
    return Row(figure, show(value) + note, wanted, value, met)


def _unjudged(row: Row) -> Row:
    return Row(row.figure, row.shown, row.target, row.value)


def _peer_note(parts: Mapping[str, Mapping[str, Any]]) -> str:
    figures = parts.get("peer", {}).get("figures", {})
    if "attention" not in figures:
        return ""
    stopped = "" if figures.get("finished") else ", stopped before its end"
    return f" (theirs with {figures['attention']}{stopped})"


def _least_seconds(parts: Mapping[str, Mapping[str, Any]], ceilings: Ceilings) -> float:
    """The roofline of the very load that the job part ran."""
    load = parts["job"]["figures"]["load"]
    return job_seconds(
        SHAPES[load["shape"]],
        Load(load["requests"], load["shortest"], load["longest"], load["seed"]).lengths(),
        ceilings,
        max_num_seqs=load["max_num_seqs"],
        max_num_batched_tokens=load["max_num_batched_tokens"],
    )


def text(found: list[Row]) -> Iterator[str]:
    """The rows for a terminal."""
    width = max(len(row.figure) for row in found)
    for row in found:
        verdict = {True: "  met", False: "  MISSED", None: ""}[row.met]
        yield f"{row.figure:{width}}  {row.shown:10}  {row.target}{verdict}"
