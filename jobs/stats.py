"""What a job cost, and where: the measured figures of its runs, merged."""

from __future__ import annotations

from typing import Any

from batchrun.jobs.determinism import computing_runs, why_not
from batchrun.jobs.files import write_json
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.metrics import merged, placed

STATS = "stats.json"  # in a job's folder
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def summarise(job: JobFolder, state: str | None = None) -> dict[str, Any]:
    """The job's summary.

    Args:
        job: The job.
        state: How it has just ended, if its worker asks.

    Returns:
        JSON-able: `job`, `state`, `model`, `device`, `attention`, `arithmetic`, `deterministic`
        (whether answers are independent of the batch; None if nothing was computed), `varies` (why
        they are not, or None), `output`, `rows` (`total`,
        `done`, `failed`, `remaining`, `resumed`, `failed_by_reason`, and `skipped` if the user
        left some out; they count as done), `finish_reasons`, `tokens`
        (`prompt`, `completion`, `prefilled`, `decoded`, `recomputed`,
        `drafted` and `accepted`: draft tokens, and those accepted; `forced`: tokens that the shape
        of the answer left no alternative to, which were not chosen; and `shared`: prompt
        tokens already computed for another row), `drafts` (`guessed` and `right` by position;
        an estimate of the seconds that all draft tokens saved; and the bytes
        of the table of answers), `duplicates` (`rows` and completion
        `tokens` taken from another row), `saved` by planning (estimated
        `prompt_tokens`, `steps` and seconds of the tail), `time` (seconds), `throughput` (of what
        was computed, per second; rows count all), `batch` (with the seconds of its tail), `kv`
        (bytes: `time_averaged` and `peak` of reserved, mapped, live, shared, static, paged;
        `utilisation` is live over mapped; None if nothing was measured; seconds of mapping hidden
        behind computing and waited for), `device_time` (seconds in and between steps; 0 on a CPU),
        `devices` (of a job with several: `device`, `host`, `rows`, `generated_tokens`, `steps`,
        `idle_s` without a row, `load_s`, `peak_kv_mapped`, `peak_rss`, `weights_bytes`, and why it
        was `lost`; all other figures are those of all devices together, and times those of the
        average one), `preemptions`, `peak_rss`, `weights_bytes`, `peak_activations`, `runs`,
        `row_seconds` (quantiles of queue, prefill, decode).
    """
    spec = job.spec()
    with job.journal() as journal:
        counts, runs, total = journal.counts(), journal.runs(), journal.meta("rows_total")
        reasons, failures = journal.tally("finish_reason"), journal.tally("error_kind")
        computing = computing_runs(journal)
        kept = journal.kept(runs[-1]["id"]) if runs else 0
        rows = {
            name: dict(zip(_SHARES, found, strict=True)) if found else None
            for name in ("queue", "prefill", "decode")
            for found in [journal.quantiles(f"{name}_s", list(_SHARES.values()))]
        }
    summary = {
        "job": job.id,
        "state": state or job.state(),
        "deterministic": why_not(computing) is None if computing else None,
        "varies": why_not(computing),
        "output": spec.output.path,
        "samples_per_row": spec.n,
        "max_tokens": spec.sampling.max_tokens,
        "rows": {
            "total": total,
            "done": counts.rows,
            "failed": counts.failed,
            "remaining": None if total is None else total - counts.rows,
            "resumed": kept // spec.n,
            "failed_by_reason": failures,
            **({"skipped": counts.skipped} if counts.skipped else {}),
        },
        "finish_reasons": reasons,
        "tokens": {"prompt": counts.prompt_tokens, "completion": counts.completion_tokens},
        "runs": len(runs),
        "row_seconds": rows,
    }
    figures = merged(run["stats"] for run in runs)
    figures["completed_rows"] = figures["completions"] / spec.n
    figures["model"] = figures["model"] or spec.model.name
    placed(summary, figures)
    return summary


def write_summary(job: JobFolder, state: str | None = None) -> None:
    """Write the summary to the job's `stats.json`, whole or not at all."""
    write_json(job.path / STATS, summarise(job, state))
