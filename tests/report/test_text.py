"""The text of `batchrun stats`: every figure of the summary is there, aligned, with its unit."""

import copy

import pytest

from batchrun.jobs import metrics
from batchrun.jobs.metrics import METRICS, Metric
from batchrun.report import text
from batchrun.report.text import render, seconds, size

SUMMARY = {
    "job": "prompts-20260101-0900-x7k2",
    "state": "done-with-errors",
    "model": "smollm2-135m-instruct",
    "device": "cpu",
    "attention": "",
    "arithmetic": "bfloat16 amx",
    "deterministic": True,
    "varies": None,
    "output": "/tmp/out.parquet",
    "samples_per_row": 1,
    "max_tokens": 64,
    "rows": {
        "total": 1200,
        "done": 1200,
        "failed": 3,
        "remaining": 0,
        "resumed": 400,
        "failed_by_reason": {"prompt_too_long": 2, "null_prompt": 1},
    },
    "finish_reasons": {"stop": 1100, "length": 97},
    "tokens": {
        "prompt": 51234,
        "completion": 40321,
        "prefilled": 51200,
        "decoded": 40300,
        "recomputed": 128,
        "drafted": 20000,
        "accepted": 15000,
        "forced": 0,
        "shared": 9876,
    },
    "drafts": {"guessed": [16000, 4000], "right": [13000, 2000], "saved_s": 12.5, "table_bytes": 9},
    "time": {
        "wall_s": 100.0,
        "load_s": 2.5,
        "tokenise_s": 0.25,
        "plan_s": 0.05,
        "engine_s": 95.0,
        "journal_s": 1.0,
        "export_s": 0.5,
    },
    "throughput": {
        "prefill_tokens_per_s": 1234.5,
        "decode_tokens_per_s": 456.7,
        "completion_tokens_per_s": 403.2,
        "rows_per_s": 12.6,
    },
    "duplicates": {"rows": 0, "tokens": 0},
    "saved": {"prompt_tokens": 0, "steps": 0, "tail_s": 0.0},
    "batch": {"steps": 987, "mean_occupancy": 41.25, "max_num_seqs": 64, "tail_s": 1.25},
    "kv": {
        "time_averaged": {
            "reserved": 64 << 30,
            "mapped": 110 << 20,
            "live": 100 << 20,
            "shared": 17 << 20,
            "static": 9 << 30,
            "paged": 104 << 20,
        },
        "peak": {
            "reserved": 64 << 30,
            "mapped": 150 << 20,
            "live": 140 << 20,
            "shared": 23 << 20,
            "static": 11 << 30,
            "paged": 145 << 20,
        },
        "utilisation": 0.9091,
        "static_utilisation": 0.0108,
        "paged_utilisation": 0.9615,
        "map_calls": 555,
        "map_s": 0.0075,
        "unmap_calls": 44,
        "unmap_s": 0.02,
        "create_calls": 33,
        "create_s": 0.11,
        "destroy_calls": 0,
        "destroy_s": 0.0,
        "map_hidden_s": 0.0,
        "map_exposed_s": 0.1375,
        "map_stalls": 0,
    },
    "device_time": {"busy_s": 0.0, "idle_s": 0.0},
    "devices": [],
    "preemptions": 7,
    "peak_rss": 1536 << 20,
    "weights_bytes": 513 << 20,
    "peak_activations": 0,
    "runs": 2,
    "row_seconds": {
        "queue": {"p50": 1.5, "p90": 30.0, "p99": 70.0, "max": 90.0},
        "prefill": {"p50": 0.02, "p90": 0.03, "p99": 0.05, "max": 0.06},
        "decode": {"p50": 2.0, "p90": 4.0, "p99": 5.0, "max": 3700.0},
    },
}


@pytest.fixture
def summary():
    return copy.deepcopy(SUMMARY)


@pytest.mark.parametrize(
    "shown",
    [
        "x7k2: done-with-errors, model smollm2-135m-instruct on cpu, 2 runs",
        "1,200 of 1,200 done, 3 failed, 400 kept from earlier runs",
        "2 failed: prompt_too_long",
        "1 failed: null_prompt",
        "stop 1,100, length 97",
        "97 completions were cut off at --max-tokens",
        "51,234 prompt, 40,321 completion",
        "128 recomputed after 7 preemptions",
        "shared       9,876 prompt tokens",
        "drafts       20,000 draft tokens, 15,000 accepted (75%)",
        "by position 81% 50%",
        "about 12.5 s saved by drafts",
        "403 completion tokens/s, 12.6 rows/s",
        "prefill 1,234 tokens/s, decode 457 tokens/s (mixed steps are split by token count)",
        "41.2 of 64 sequences running on average, 987 steps",
        "fewer than half of that in the last 1.2 s",
        "1 min 40 s",
        "1 min 35 s",
        "engine (95%)",
        "555 map calls in 7.5 ms, 44 unmap calls in 20 ms, 33 create calls in 0.1 s",
        "1.5 GiB, of which 513.0 MiB weights",
    ],
)
def test_every_figure_is_shown_with_its_unit(summary, shown):
    assert shown in render(summary)


def test_one_line_says_whether_answers_depend_on_the_batch(summary):
    assert "answers      deterministic, computed with bfloat16 amx\n" in render(summary)
    summary |= {"deterministic": False, "varies": "runs 1 and 3 computed with this and that"}
    assert "answers      not deterministic: runs 1 and 3 computed with this and" in render(summary)
    summary |= {"deterministic": None, "varies": None}
    assert "deterministic" not in render(summary)


def test_what_was_not_computed_twice_is_shown_where_there_is_some(summary):
    assert "duplicates" not in render(summary)
    summary["duplicates"] = {"rows": 4321, "tokens": 98765}
    assert "duplicates   4,321 rows, 98,765 completion tokens" in render(summary)
    assert "planned" not in render(summary)
    summary["saved"] = {"prompt_tokens": 12345, "steps": 67, "tail_s": 1.5}
    planned = "planned      saved about 12,345 prompt tokens, 67 steps, 1.5 s of tail"
    assert planned in render(summary)
    summary["tokens"] |= {"drafted": 0, "accepted": 0}
    summary["drafts"] |= {"guessed": [], "right": [], "saved_s": 0.0}
    assert "drafts" not in render(summary)
    assert "by drafts" not in render(summary)


def test_forced_tokens_are_no_guesses(summary):
    assert "forced" not in render(summary)
    summary["tokens"] |= {"drafted": 10, "accepted": 5, "forced": 20}
    text = render(summary)
    assert "10 draft tokens, 5 accepted (50%)" in text
    assert "forced       20 tokens that the output's structure determined" in text


def test_draft_tokens_may_have_cost_more_than_they_saved(summary):
    summary["drafts"] |= {"saved_s": -0.25}
    assert "about 0.2 s lost by drafts" in render(summary)


def test_memory_that_was_given_back_is_shown_where_some_was(summary):
    assert "destroy" not in render(summary)
    summary["kv"] |= {"destroy_calls": 4321, "destroy_s": 0.25}
    lines = [line.strip() for line in render(summary).splitlines() if "destroy" in line]
    assert lines == ["4,321 destroy calls in 0.2 s"]


def test_a_gpus_time_and_memory_are_shown_where_there_is_one(summary):
    assert "GPU" not in render(summary)
    summary["device"], summary["attention"] = "cuda:0", "torch-flash"
    summary["device_time"] = {"busy_s": 95.0, "idle_s": 0.95}
    summary["kv"] |= {"map_hidden_s": 1.25, "map_exposed_s": 0.1, "map_stalls": 3}
    summary["peak_activations"] = 3 << 30
    text = render(summary)
    for shown in (
        "on cuda:0 (torch-flash), 2 runs",
        "1.2 s hidden behind compute, 0.1 s not (0%), 3 stalls",
        "1 min 35 s in steps, 0.9 s between them (1%)",
        "513.0 MiB weights, 3.0 GiB activations at most",
    ):
        assert shown in text


def test_the_memory_table_is_aligned_and_says_what_each_line_means(summary):
    lines = render(summary).splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("KV memory"))) :][:7]
    assert [line.split()[0] for line in table[1:]] == [
        "live",
        "mapped",
        "shared",
        "paged",
        "static",
        "reserved",
    ]
    mapped = next(line for line in table if "mapped" in line)
    assert mapped.split()[1:6] == ["110.0", "MiB", "150.0", "MiB", "90.9%"]
    peaks = {line.index("iB", line.index("iB") + 2) for line in table[1:]}
    assert len(peaks) <= 2  # one column, whose unit moves with the number before it
    assert table[0].index("peak") == mapped.index("150.0")


def test_quantiles_stand_in_their_columns(summary):
    lines = render(summary).splitlines()
    head = next(line for line in lines if line.startswith("each row"))
    decode = next(line for line in lines if line.strip().startswith("decode"))
    assert head.split() == ["each", "row", "p50", "p90", "p99", "max"]
    assert decode.split(maxsplit=7)[1:] == ["2.0", "s", "4.0", "s", "5.0", "s", "1 h 1 min"]
    assert head.index("max") == decode.index("1 h")


def test_no_line_is_wider_than_a_terminal(summary):
    assert max(map(len, render(summary).splitlines())) <= 110


def test_a_clean_job_mentions_no_failures_and_no_truncation(summary):
    summary["rows"] |= {"failed": 0, "failed_by_reason": {}, "resumed": 0}
    summary["finish_reasons"] = {"stop": 1200}
    text = render(summary)
    assert "1,200 of 1,200 done\n" in text
    assert "failed" not in text.replace("done-with-errors", "")
    assert "cut off" not in text


def test_another_row_of_the_table_is_another_figure_and_line(summary, monkeypatch):
    """In `stats.json`, whichever section it is of, and in the text where it is not 0."""
    keys = ("naps", "tokens.lost", "kv.moves", "device_time.naps", "time.nap_s")
    rows = [Metric(f"x{i}", "", sum, key, f"new {key}") for i, key in enumerate(keys)]
    for module in (metrics, text):
        monkeypatch.setattr(module, "METRICS", (*METRICS, *rows))
    runs = [{"steps": 7, "x0": 1200, "x1": 30}, {"x0": 34, "x2": 5, "x4": 6}]
    metrics.placed(summary, {"completed_rows": 0} | metrics.merged(runs))
    assert (summary["naps"], summary["tokens"]["lost"], summary["kv"]["moves"]) == (1234, 30, 5)
    new = [" ".join(line.split()) for line in render(summary).splitlines() if "new " in line]
    assert new == ["1,234 new naps", "30 new tokens.lost", "6.0 s new time.nap_s", "5 new kv.moves"]


def test_a_job_that_never_ran_shows_no_memory(summary):
    summary["rows"] |= {"total": None, "done": 0, "remaining": None, "failed": 0, "resumed": 0}
    summary["rows"]["failed_by_reason"] = {}
    summary["batch"] = {"steps": 0, "mean_occupancy": None, "max_num_seqs": 0, "tail_s": 0.0}
    summary["throughput"] = dict.fromkeys(summary["throughput"])
    summary["time"] = dict.fromkeys(summary["time"], 0.0)
    text = render(summary)
    assert "0 of ? done" in text
    assert "KV memory" not in text


def test_phases_that_no_row_reached_are_left_out(summary):
    summary["row_seconds"]["decode"] = None
    assert "  decode " not in render(summary)
    assert "  prefill" in render(summary)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 20, "1.5 GiB"),
        (1 << 60, "1024.0 PiB"),
    ],
)
def test_sizes(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 ms"),
        (0.0042, "4.2 ms"),
        (0.05, "50 ms"),
        (1.25, "1.2 s"),
        (59.99, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (90061, "25 h 1 min"),
    ],
)
def test_durations(value, text):
    assert seconds(value) == text


def test_each_device_has_a_line_and_says_why_it_was_lost(summary):
    device = {"host": "a", "device": "cuda:0", "rows": 1200, "generated_tokens": 40000}
    device |= {"idle_s": 1.9, "load_s": 9.0, "lost": None}
    device |= {"peak_kv_mapped": 1 << 30, "weights_bytes": 2 << 30}
    summary["devices"] = [device, {**device, "device": "cuda:1", "lost": "it fell off the bus"}]
    lines = render(summary).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("devices"))
    assert lines[first].split() == [
        *("devices", "rows", "tokens", "idle", "load", "peak", "KV", "weights")
    ]
    assert lines[first + 1].split() == [
        *("cuda:0", "1,200", "40,000", "1.9", "s", "(2%)", "9.0", "s", "1.0", "GiB", "2.0", "GiB")
    ]
    assert lines[first + 2].endswith("lost: it fell off the bus")
    summary["devices"][1]["host"] = "b"
    assert "\n  b cuda:1 " in render(summary)
