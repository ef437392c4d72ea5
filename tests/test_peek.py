"""What is shown of a job's rows: the answers of the journal, and only the prompts they are of."""

import gzip
import json
import os

import pytest

from batchrun.jobs.journal.journal import READ
from batchrun.jobs.journal.results import Result
from batchrun.jobs.options import PromptSpec
from batchrun.jobs.rows.source import open_source
from batchrun.peek import examples
from tests.jobs.test_rejoin import EDITS, KINDS, ROWS, answered, edited, job_of, still, written


def computed(job, results, columns):
    """The job with these results, and the digests of what a worker would have read."""
    spec = job.spec()
    rows = list(open_source(spec.parts, spec.input_format).rows(columns))
    with job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.set_meta("rows_total", len(rows))
        journal.set_meta(READ, columns)
        journal.write(results, digests=[(row.index, row.digest) for row in rows])
    return job


def ok(row, text="fine", sample=0):
    return Result(row, sample, "ok", text, (1,), "stop", 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_come_with_the_prompts_they_are_of(tmp_path, kind):
    job = job_of(tmp_path, written(tmp_path / f"in.{kind}", kind, ROWS), kind=kind)
    answered(job)
    shown = examples(job, 4)
    assert [(e.row, e.prompt, e.answer) for e in shown] == [
        (row, f"prompt {row}", f"prompt {row}#0") for row in range(4)
    ]
    first = shown[0]
    assert (first.finish_reason, first.prompt_tokens, first.completion_tokens) == ("stop", 1, 1)
    assert (first.error, first.status, first.unread) == (None, "ok", None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_row_that_changed_is_not_shown_as_the_one_computed(tmp_path, kind, edit):
    source = written(tmp_path / f"in.{kind}", kind, ROWS)
    job = job_of(tmp_path, source, kind=kind)
    answered(job)
    now = EDITS[edit](ROWS)
    written(source, kind, now)
    shown = examples(job, None)
    assert [e.answer for e in shown] == [f"{row['prompt']}#0" for row in ROWS]
    for example in shown:
        if example.row in still(ROWS, now):
            assert example.prompt in (ROWS[example.row]["prompt"], None)
            assert (example.prompt is None) == (example.unread is not None)
        else:
            assert example.prompt is None
            assert example.unread
    if edit == "edited":
        assert [e.row for e in shown if e.unread] == [2]


def test_an_input_that_is_gone_leaves_the_answers(tmp_path):
    source = written(tmp_path / "in.jsonl", "jsonl", ROWS)
    job = job_of(tmp_path, source, kind="jsonl")
    answered(job)
    source.unlink()
    [shown] = examples(job, 1)
    assert (shown.prompt, shown.answer) == (None, "prompt 0#0")
    assert str(source) in shown.unread
    [shown] = examples(job, 1, unread="the reader crashed")
    assert (shown.prompt, shown.unread) == (None, "the reader crashed")


def test_a_row_without_a_digest_is_not_proven(tmp_path):
    job = job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")
    answered(job, digests=False)
    assert {e.prompt for e in examples(job, None)} == {None}


def test_failed_rows_say_why_and_rows_can_be_chosen(tmp_path):
    job = job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")
    bad = Result(4, 0, "error", error="the prompt is too long", error_kind="prompt_too_long")
    left_out = Result(1, 0, "skipped", error_kind="empty_prompt")
    computed(job, [ok(0), left_out, ok(2), bad, ok(5)], ["prompt"])
    [failed] = examples(job, 5, failed=True)
    assert (failed.row, failed.prompt, failed.answer) == (4, "prompt 4", None)
    assert (failed.error, failed.status) == ("the prompt is too long", "error")
    assert examples(job, 5)[1].status == "skipped"
    assert [e.row for e in examples(job, None, rows=[range(4, 6), range(0, 1)])] == [0, 4, 5]
    assert [e.row for e in examples(job, None, rows=[range(3, 4)])] == []
    assert [e.row for e in examples(job, 2, rows=[range(1, 6), range(2, 3)])] == [1, 2]
    drawn = [tuple(e.row for e in examples(job, 2, seed=seed)) for seed in range(20)]
    assert drawn[0] == tuple(e.row for e in examples(job, 2, seed=0))
    assert len(set(drawn)) > 3
    assert {row for pair in drawn for row in pair} == {0, 1, 2, 4, 5}


def test_samples_are_those_of_the_output(tmp_path):
    source = written(tmp_path / "in.jsonl", "jsonl", ROWS[:2])
    job = job_of(tmp_path, source, kind="jsonl", n=3, keep=2)
    answered(job, without={(1, 2)})
    shown = examples(job, None)
    assert [(e.row, e.sample, e.answer) for e in shown] == [
        (0, 0, "prompt 0#1"),
        (0, 1, "prompt 0#2"),
    ]


def test_a_failed_sample_is_shown_though_others_are_kept(tmp_path):
    source = written(tmp_path / "in.jsonl", "jsonl", ROWS[:1])
    job = job_of(tmp_path, source, kind="jsonl", n=2, keep=1)
    bad = Result(0, 1, "error", error="no", error_kind="x")
    computed(job, [ok(0), bad], ["prompt"])
    assert [(e.sample, e.error) for e in examples(job, 5, failed=True)] == [(1, "no")]


@pytest.mark.parametrize(
    ("prompt", "row", "shown"),
    [
        (PromptSpec(column=None, template="{a}: {b}"), {"a": "x", "b": [1]}, "x: [1]"),
        (PromptSpec(column=None, template="{a}"), {"a": None}, None),
        (PromptSpec(column="prompt", system="be brief"), {"prompt": "hi"}, "hi"),
        (PromptSpec(column="prompt"), {"prompt": None}, None),
        (PromptSpec(column="prompt"), {"prompt": {"a": 1}}, '{"a": 1}'),
        (PromptSpec(column="prompt"), {"prompt": 3}, "3"),
        (PromptSpec(column="messages"), {"messages": "no chat"}, "no chat"),
        (
            PromptSpec(column="messages"),
            {
                "messages": [
                    {"role": "user", "content": "first"},
                    {"role": "assistant", "content": "so"},
                    {"role": "user", "content": [{"type": "text", "text": "last"}]},
                    {"role": "assistant", "content": "Well"},
                ]
            },
            "last",
        ),
        (
            PromptSpec(column="conversations"),
            {"conversations": json.dumps([{"from": "human", "value": "hello"}])},
            "hello",
        ),
        (PromptSpec(column="messages"), {"messages": [{"role": "system", "content": "s"}]}, "s"),
    ],
)
def test_the_prompt_is_what_was_asked(tmp_path, prompt, row, shown):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(row) + "\n")
    job = job_of(tmp_path, source, kind="jsonl", prompt=prompt)
    computed(job, [ok(0)], list(row))
    [example] = examples(job, 1)
    assert (example.prompt, example.unread) == (shown, None)


def test_rows_far_behind_are_streamed(tmp_path):
    """And the input is not read beyond the last of them: here it is damaged there."""
    source, rows = tmp_path / "in.jsonl.gz", 3000
    with gzip.open(source, "wt", compresslevel=1) as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"p{i}", "note": os.urandom(1000).hex()}) + "\n")
    job = job_of(tmp_path, source, kind="jsonl")
    computed(job, [ok(row) for row in (0, rows - 1)], ["prompt"])
    assert [e.prompt for e in examples(job, None)] == ["p0", f"p{rows - 1}"]
    source.write_bytes(source.read_bytes()[:-2000])
    first, last = examples(job, None)
    assert (last.prompt, last.unread is not None) == (None, True)
    assert examples(job, 1)[0].prompt == "p0"
    assert first.prompt == "p0"


def test_only_columns_that_were_read_are_asked_for(tmp_path):
    """A Parquet file's other columns may be of types that nothing here can read."""
    source = written(tmp_path / "in.parquet", "parquet", ROWS)
    job = job_of(tmp_path, source, kind="parquet")
    answered(job)
    written(source, "parquet", [{**row, "note": "other"} for row in ROWS])
    assert [e.prompt for e in examples(job, None)] == [row["prompt"] for row in ROWS]
    written(source, "parquet", [{"note": row["note"]} for row in edited(ROWS)])
    assert {e.prompt for e in examples(job, None)} == {None}
    assert "'prompt'" in examples(job, 1)[0].unread


def test_a_job_that_has_not_begun_has_nothing_to_show(tmp_path):
    job = job_of(tmp_path, written(tmp_path / "in.jsonl", "jsonl", ROWS), kind="jsonl")
    assert examples(job, 5) == []
