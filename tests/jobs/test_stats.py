"""The summary: measured figures of all runs, merged."""

import json

import pytest

from batchrun.jobs.files import read_json
from batchrun.jobs.journal.results import Result
from batchrun.jobs.lease import Lease
from batchrun.jobs.metrics import METRICS, RATIOS, across, merged, recorded
from batchrun.jobs.stats import summarise, write_summary

KV = ("reserved", "mapped", "live", "shared", "static", "paged")


def ok(row, sample=0, **more):
    return Result(
        row, sample, "ok", "x", finish_reason="stop", prompt_tokens=5, completion_tokens=3, **more
    )


def test_merging_adds_amounts_and_keeps_peaks():
    first = recorded(
        {
            "wall_s": 2.0,
            "steps": 10,
            "peak_kv_mapped": 700,
            "peak_rss": 5,
            "max_num_seqs": 8,
            "kv_live_s": 30.0,
            "kv_s": 2.0,
            "weights_bytes": 11,
            "device": "cpu",
            "model": "tiny",
        }
    )
    second = recorded(
        {
            "wall_s": 3.0,
            "steps": 1,
            "peak_kv_mapped": 600,
            "peak_rss": 6,
            "max_num_seqs": 4,
            "kv_live_s": 10.0,
            "kv_s": 1.0,
            "weights_bytes": 11,
            "device": "cpu",
        }
    )
    figures = merged([first, second])
    assert (figures["wall_s"], figures["steps"]) == (5.0, 11)
    assert [figures[name] for name in ("peak_kv_mapped", "peak_rss", "max_num_seqs")] == [700, 6, 8]
    assert [figures[name] for name in ("kv_live_s", "kv_s", "weights_bytes")] == [40.0, 3.0, 11]
    assert (figures["device"], figures["model"]) == ("cpu", "tiny")
    assert merged([second, first]) == figures


def test_merging_one_run_changes_nothing_and_none_is_zero():
    numbers = {m.name: [i] if m.zero == [] else type(m.zero)(i + 1) for i, m in enumerate(METRICS)}
    numbers["devices"] = [{"device": "cpu:0", "host": "here", "rows": 3, "lost": None}]
    assert merged([numbers]) == numbers
    zeros = recorded({})
    assert merged([]) == merged([{}]) == zeros
    assert {type(value) for value in zeros.values()} == {str, int, float, list}


def test_what_is_no_metric_is_not_recorded():
    with pytest.raises(KeyError, match="stepz"):
        recorded({"steps": 1, "stepz": 2})


def test_every_figure_has_a_name_and_a_place_of_its_own():
    names = [metric.name for metric in METRICS]
    keys = [*(row.key for row in METRICS if row.key), *RATIOS]
    assert len({*names}) == len(names)
    assert len({*keys}) == len(keys)
    assert {name for ratio in RATIOS.values() for name in ratio} <= {
        *names,
        "completed_rows",
    }


def test_a_job_that_never_ran_has_a_summary(job):
    summary = summarise(job)
    assert summary["job"] == job.id
    assert summary["state"] == "new"
    assert summary["model"] == "tiny"
    assert summary["rows"]["total"] is None
    assert summary["rows"]["done"] == summary["runs"] == 0
    assert summary["kv"]["utilisation"] is None
    json.dumps(summary, allow_nan=False)


def run(job, results, state, **stats):
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", 10)
        stats = recorded({"completions": len(results), **stats})
        journal.write(results, stats)
        if state is not None:
            journal.end_run(state, stats)


@pytest.fixture
def two_runs(job):
    """A run that was killed and the one that resumed it: 9 of 10 rows, 2 of them failed."""
    integrals = {
        f"kv_{name}_s": amount for name, amount in zip(KV, (80, 20, 18, 6, 36, 20), strict=True)
    }
    first = [ok(i, queue_s=float(i), prefill_s=0.5, decode_s=2.0) for i in range(5)]
    run(
        job,
        first,
        None,
        wall_s=4.0,
        engine_s=2.0,
        load_s=1.0,
        kv_s=2.0,
        sequence_s=8.0,
        steps=4,
        prefill_tokens=25,
        prefill_s=0.5,
        decode_tokens=10,
        drafted_tokens=5,
        accepted_tokens=3,
        decode_s=1.5,
        completion_tokens=15,
        map_calls=3,
        peak_kv_mapped=12,
        max_num_seqs=8,
        model="tiny",
        **integrals,
    )
    second = [
        ok(5),
        ok(6),
        Result(7, 0, "error", error="too long", error_kind="context"),
        Result(8, 0, "error", error="no prompt", error_kind="input"),
    ]
    run(
        job,
        second,
        "interrupted",
        wall_s=3.0,
        engine_s=1.0,
        load_s=1.0,
        kv_s=2.0,
        sequence_s=4.0,
        steps=6,
        prefill_tokens=10,
        prefill_s=0.5,
        decode_tokens=4,
        drafted_tokens=4,
        accepted_tokens=1,
        decode_s=0.5,
        completion_tokens=6,
        map_calls=2,
        peak_kv_mapped=10,
        max_num_seqs=8,
        preemptions=1,
        **integrals,
    )
    return job


def test_the_summary_of_two_runs(two_runs):
    summary = summarise(two_runs)
    assert (summary["state"], summary["runs"]) == ("interrupted", 2)
    rows = summary["rows"]
    assert (rows["total"], rows["done"], rows["failed"], rows["remaining"]) == (10, 9, 2, 1)
    assert rows["resumed"] == 5
    assert rows["failed_by_reason"] == {"context": 1, "input": 1}
    assert summary["finish_reasons"] == {"stop": 7}
    assert summary["tokens"] == {
        "prompt": 35,
        "completion": 21,
        "prefilled": 35,
        "decoded": 14,
        "recomputed": 0,
        "drafted": 9,
        "accepted": 4,
        "forced": 0,
        "shared": 0,
    }
    assert (summary["time"]["wall_s"], summary["time"]["load_s"]) == (7.0, 2.0)
    throughput = summary["throughput"]
    assert throughput["prefill_tokens_per_s"] == 35.0
    assert throughput["decode_tokens_per_s"] == 7.0
    assert throughput["completion_tokens_per_s"] == 7.0
    assert throughput["rows_per_s"] == 3.0
    assert summary["batch"] == {
        "steps": 10,
        "mean_occupancy": 3.0,
        "max_num_seqs": 8,
        "tail_s": 0.0,
    }
    kv = summary["kv"]
    assert kv["time_averaged"] == dict(zip(KV, (40.0, 10.0, 9.0, 3.0, 18.0, 10.0), strict=True))
    assert (kv["utilisation"], kv["static_utilisation"], kv["paged_utilisation"]) == (0.9, 0.5, 0.9)
    assert (kv["peak"]["mapped"], kv["map_calls"], summary["preemptions"]) == (12, 5, 1)
    assert summary["row_seconds"]["queue"] == {"p50": 2.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert summary["row_seconds"]["decode"]["p50"] == 2.0


AMX = {"arithmetic": "bfloat16 amx", "generated_tokens": 3}


@pytest.mark.parametrize(
    ("runs", "varies"),
    [
        ([AMX, AMX], None),
        ([AMX, {}, AMX], None),  # the second computed nothing
        ([AMX, {"arithmetic": "float32 torch", "varies": "it rains"}], None),
        ([AMX, AMX | {"varies": "it rains"}, AMX], "it rains"),
        ([AMX, {"generated_tokens": 1}], "run 2 did not record how it computed"),
        (
            [AMX, {}, AMX | {"arithmetic": "bfloat16 avx512"}],
            "runs 1 and 3 computed with bfloat16 amx and bfloat16 avx512",
        ),
    ],
)
def test_a_job_is_deterministic_if_all_runs_that_computed_were(job, runs, varies):
    for stats in runs:
        run(job, [], "interrupted", **stats)
    summary = summarise(job)
    assert (summary["deterministic"], summary["varies"]) == (varies is None, varies)


def test_a_run_with_answers_but_no_figures_leaves_it_unknown(job):
    assert (summarise(job)["deterministic"], summarise(job)["varies"]) == (None, None)
    run(job, [ok(0)], "interrupted")
    assert summarise(job)["varies"] == "run 1 did not record how it computed"


def test_stats_json_is_the_summary(two_runs):
    write_summary(two_runs)
    assert read_json(two_runs.path / "stats.json") == summarise(two_runs)


def test_rows_of_several_samples_are_counted_as_rows(make_job):
    job = make_job(n=2)
    results = [ok(0, 0), ok(0, 1), ok(1, 0), Result(2, 0, "error", error_kind="input")]
    run(job, [*results, Result(2, 1, "error", error_kind="input")], "done-with-errors")
    rows = summarise(job)["rows"]
    assert (rows["done"], rows["remaining"], rows["failed"]) == (2, 8, 1)
    assert rows["failed_by_reason"] == {"input": 1}


def test_rows_that_were_left_out_are_counted_apart(job):
    run(job, [ok(0), Result(1, 0, "skipped"), Result(2, 0, "skipped")], None)
    with Lease(job.path):
        write_summary(job, "cancelled")
    summary = json.loads((job.path / "stats.json").read_text())
    assert summary["state"] == "cancelled"
    assert (summary["rows"]["done"], summary["rows"]["failed"]) == (3, 0)
    assert summary["rows"]["skipped"] == 2


def test_engines_at_the_same_time_are_as_one_that_does_what_all_do():
    """Counts and bytes add up; the time that they are divided by is one engine's."""
    one = recorded({"decode_tokens": 60, "decode_s": 2.0, "kv_live_s": 8.0, "kv_s": 4.0})
    other = recorded({"decode_tokens": 40, "decode_s": 3.0, "kv_live_s": 4.0, "kv_s": 4.0})
    one |= {"device": "cuda:0", "arithmetic": "x", "right_at": [2, 1], "wall_s": 9.0}
    other |= {"device": "cuda:1", "arithmetic": "x", "right_at": [3], "peak_kv_live": 5}
    both = across([one, other])
    assert both["decode_tokens"] / both["decode_s"] == 40
    assert both["kv_live_s"] / both["kv_s"] == 3  # bytes on average, in both together
    assert (both["device"], both["arithmetic"], both["right_at"]) == ("cuda:0, cuda:1", "x", [5, 1])
    assert both["peak_kv_live"] == 5
    assert "wall_s" not in both  # it is the run's, not the sum
    assert across([one]) == {name: one[name] for name in both}
    idle = across([one, recorded({})])
    assert (idle["decode_s"], idle["kv_s"]) == (one["decode_s"], one["kv_s"])  # no faster by it
    brief = across([one, recorded({"kv_s": 1.0, "kv_live_s": 1.0})])
    assert brief["kv_live_s"] / brief["kv_s"] == 9 / 4  # no more than both had at most


def test_what_devices_did_adds_up_over_runs():
    def device(name, rows, lost=None, peak=1):
        return {"host": "h", "device": name, "rows": rows, "lost": lost, "peak_rss": peak}

    runs = [
        {"devices": [device("a", 3, peak=9), device("b", 4)]},
        {"devices": [device("b", 5, "x")]},
    ]
    assert merged(runs)["devices"] == [device("a", 3, peak=9), device("b", 9, "x")]
