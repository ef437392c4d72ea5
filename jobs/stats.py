"""What a job cost and where it went: measured figures of its runs, merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from batchrun.jobs.files import write_json
from batchrun.jobs.folder import JobFolder

STATS = "stats.json"  # in a job's folder
_KV = ("reserved", "mapped", "live", "shared", "static", "paged")
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class RunStats:
    """One worker's run, all of it measured. Seconds, bytes, tokens and counts since its start.

    `prefill_s` and `decode_s` share a mixed step's time by tokens. `kv_*_s` are byte-seconds over
    `kv_s` seconds of engine time; `sequence_s` is the same integral of running sequences.
    `duplicates` are results that were not computed, since another row asked the same;
    `completions` counts them, `completion_tokens` does not. `tail_s` is the end of the engine's
    time, from when half as many sequences ran last as ran on average. `saved_*` is what the file's
    order would have taken more, about; 0 for a run that ended early.
    """

    started_at: float = 0.0
    wall_s: float = 0.0
    load_s: float = 0.0
    tokenise_s: float = 0.0
    plan_s: float = 0.0
    engine_s: float = 0.0
    journal_s: float = 0.0
    export_s: float = 0.0
    steps: int = 0
    completions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    recomputed_tokens: int = 0
    shared_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sequence_s: float = 0.0
    completion_tokens: int = 0
    duplicates: int = 0
    duplicate_tokens: int = 0
    tail_s: float = 0.0
    saved_prompt_tokens: int = 0
    saved_steps: int = 0
    saved_tail_s: float = 0.0
    max_num_seqs: int = 0
    kv_s: float = 0.0
    kv_reserved_s: float = 0.0
    kv_mapped_s: float = 0.0
    kv_live_s: float = 0.0
    kv_shared_s: float = 0.0
    kv_static_s: float = 0.0
    kv_paged_s: float = 0.0
    peak_kv_reserved: int = 0
    peak_kv_mapped: int = 0
    peak_kv_live: int = 0
    peak_kv_shared: int = 0
    peak_kv_static: int = 0
    peak_kv_paged: int = 0
    map_calls: int = 0
    map_s: float = 0.0
    unmap_calls: int = 0
    unmap_s: float = 0.0
    create_calls: int = 0
    create_s: float = 0.0
    map_hidden_s: float = 0.0
    map_exposed_s: float = 0.0
    map_stalls: int = 0
    device_s: float = 0.0
    idle_s: float = 0.0
    preemptions: int = 0
    peak_rss: int = 0
    peak_activations: int = 0
    weights_bytes: int = 0
    device: str = ""
    attention: str = ""
    model: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def merge(cls, runs: Iterable[dict[str, Any]]) -> RunStats:
        """Runs of one job as one: amounts add up, peaks and settings are the largest."""
        merged = cls()
        for run in runs:
            for f in fields(cls):
                value = run.get(f.name, f.default)
                mine = getattr(merged, f.name)
                if f.name == "started_at":
                    value = min(v for v in (mine, value) if v) if mine or value else 0.0
                elif f.name.startswith(("peak_", "max_")) or f.name == "weights_bytes":
                    value = max(mine, value)
                elif isinstance(mine, str):
                    value = value or mine
                else:
                    value = mine + value
                setattr(merged, f.name, value)
        return merged


def summarise(job: JobFolder, state: str | None = None) -> dict[str, Any]:
    """The job's summary.

    Args:
        job: The job.
        state: How it has just ended, where the worker that ended it asks.

    Returns:
        JSON-able: `job`, `state`, `model`, `device`, `attention`, `output`, `rows` (`total`,
        `done`, `failed`, `remaining`, `resumed`, `failed_by_reason`, and `skipped` where the user
        left some out; they are among the done ones), `finish_reasons`, `tokens`
        (`prompt`, `completion`, `prefilled`, `decoded`, `recomputed`,
        `drafted` and `accepted`: guessed, and of these right; and `shared`: of prompts, not
        computed because another row had), `duplicates` (`rows` and
        completion `tokens` that were taken from another row), `saved` by planning (about so many
        `prompt_tokens`, `steps` and seconds of the tail), `time` (seconds), `throughput` (of what
        was computed, per second; rows of all), `batch` (with the seconds of its tail), `kv` (bytes:
        `time_averaged` and `peak` of reserved, mapped, live, shared, static, paged; `utilisation`
        is live over mapped; None where nothing was measured; seconds of mapping that computing hid
        and that it waited for), `device_time` (seconds in steps and between them; 0 on a CPU),
        `preemptions`, `peak_rss`, `weights_bytes`, `peak_activations`, `runs`, `row_seconds`
        (quantiles of queue, prefill, decode).
    """
    spec = job.spec()
    with job.journal() as journal:
        counts, runs, total = journal.counts(), journal.runs(), journal.meta("rows_total")
        reasons, failures = journal.tally("finish_reason"), journal.tally("error_kind")
        rows = {
            name: dict(zip(_SHARES, found, strict=True)) if found else None
            for name in ("queue", "prefill", "decode")
            for found in [journal.quantiles(f"{name}_s", list(_SHARES.values()))]
        }
    stats = RunStats.merge(run["stats"] for run in runs)
    last = runs[-1]["stats"].get("completions", 0) if runs else 0
    averages = {k: _per(getattr(stats, f"kv_{k}_s"), stats.kv_s) for k in _KV}
    return {
        "job": job.id,
        "state": state or job.state(),
        "model": stats.model or spec.model.get("name"),
        "device": stats.device,
        "attention": stats.attention,
        "output": spec.output.get("path"),
        "samples_per_row": spec.n,
        "max_tokens": spec.sampling.get("max_tokens"),
        "rows": {
            "total": total,
            "done": counts.rows,
            "failed": counts.failed,
            "remaining": None if total is None else total - counts.rows,
            "resumed": (counts.samples - last) // spec.n if len(runs) > 1 else 0,
            "failed_by_reason": failures,
            **({"skipped": counts.skipped} if counts.skipped else {}),
        },
        "finish_reasons": reasons,
        "tokens": {
            "prompt": counts.prompt_tokens,
            "completion": counts.completion_tokens,
            "prefilled": stats.prefill_tokens,
            "decoded": stats.decode_tokens,
            "recomputed": stats.recomputed_tokens,
            "drafted": stats.drafted_tokens,
            "accepted": stats.accepted_tokens,
            "shared": stats.shared_tokens,
        },
        "duplicates": {"rows": stats.duplicates, "tokens": stats.duplicate_tokens},
        "saved": {k: getattr(stats, f"saved_{k}") for k in ("prompt_tokens", "steps", "tail_s")},
        "time": {
            f"{k}_s": getattr(stats, f"{k}_s")
            for k in ("wall", "load", "tokenise", "plan", "engine", "journal", "export")
        },
        "throughput": {
            "prefill_tokens_per_s": _per(stats.prefill_tokens, stats.prefill_s),
            "decode_tokens_per_s": _per(stats.decode_tokens, stats.decode_s),
            "completion_tokens_per_s": _per(stats.completion_tokens, stats.engine_s),
            "rows_per_s": _per(stats.completions / spec.n, stats.engine_s),
        },
        "batch": {
            "steps": stats.steps,
            "mean_occupancy": _per(stats.sequence_s, stats.kv_s),
            "max_num_seqs": stats.max_num_seqs,
            "tail_s": stats.tail_s,
        },
        "kv": {
            "time_averaged": averages,
            "peak": {k: getattr(stats, f"peak_kv_{k}") for k in _KV},
            "utilisation": _per(stats.kv_live_s, stats.kv_mapped_s),
            "static_utilisation": _per(stats.kv_live_s, stats.kv_static_s),
            "paged_utilisation": _per(stats.kv_live_s, stats.kv_paged_s),
            **{
                k: getattr(stats, k)
                for k in (
                    "map_calls",
                    "map_s",
                    "unmap_calls",
                    "unmap_s",
                    "create_calls",
                    "create_s",
                    "map_hidden_s",
                    "map_exposed_s",
                    "map_stalls",
                )
            },
        },
        "device_time": {"busy_s": stats.device_s, "idle_s": stats.idle_s},
        "preemptions": stats.preemptions,
        "peak_rss": stats.peak_rss,
        "weights_bytes": stats.weights_bytes,
        "peak_activations": stats.peak_activations,
        "runs": len(runs),
        "row_seconds": rows,
    }


def write_summary(job: JobFolder, state: str | None = None) -> Path:
    """Write the summary to the job's `stats.json`, whole or not at all."""
    path = job.path / STATS
    write_json(path, summarise(job, state))
    return path


def _per(amount: float, by: float) -> float | None:
    return amount / by if by else None
