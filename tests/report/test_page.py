"""The page: every figure of `stats` in the same words, for jobs in every state."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.cli.inspect import job_parameters
from batchrun.cli.report import _examples
from batchrun.jobs.journal.results import Scores
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.spec import InputFile
from batchrun.report.collect import EXAMPLES, SAMPLES, collect
from batchrun.report.page import render_page, shortened, visible
from batchrun.report.text import render
from batchrun.report.timeline import timeline
from tests.report.pages import Page, answer, failure, figures, run
from tests.report.test_text import SUMMARY

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'><style>*{}</style>"
    "<!-- {{ 7*7 }} {% raw %} &amp; \x1b[2J\x00\u202egnp\u202c\u200b\u2028\ufeff\U000e0041"
)


def collected(job, *, examples=True):
    return collect(job, job_parameters(job.spec()), _examples(job) if examples else None)


def page_of(*jobs, examples=True):
    return Page(render_page([collected(job, examples=examples) for job in jobs]))


@pytest.fixture
def data(job):
    """What a page about a job that never ran is made from, with a summary that has everything."""
    summary = copy.deepcopy(SUMMARY)
    summary["tokens"] |= {"forced": 12}
    summary["duplicates"] = {"rows": 4321, "tokens": 98765}
    summary["saved"] = {"prompt_tokens": 12345, "steps": 67, "tail_s": 1.5}
    summary["kv"] |= {"destroy_calls": 4321, "destroy_s": 0.25, "map_hidden_s": 1.25}
    device = {"host": "a", "device": "cuda:0", "rows": 1200, "generated_tokens": 40000}
    device |= {"idle_s": 1.9, "load_s": 9.0, "lost": None}
    device |= {"peak_kv_mapped": 1 << 30, "weights_bytes": 2 << 30}
    summary["devices"] = [device, {**device, "host": "b", "lost": "it fell off the bus"}]
    return {**collected(job), "summary": summary}


@pytest.mark.parametrize("gpu", [False, True])
def test_every_figure_that_stats_shows_stands_in_the_page_in_the_same_words(data, gpu):
    if gpu:
        data["summary"]["device_time"] = {"busy_s": 95.0, "idle_s": 0.95}
    page = Page(render_page([data]))
    lines = render(data["summary"]).splitlines()
    shown = [cell.strip() for line in lines[1:] for cell in re.split(r" {2,}", line) if cell]
    assert len(shown) > 120
    assert [cell for cell in shown if cell not in page.text] == []
    assert lines[0].partition(", ")[2] in page.text
    assert data["summary"]["state"] in page.text


def test_the_figures_of_a_real_job_are_those_of_stats(job):
    run(job, [answer(0), failure(1)], "interrupted", 20.0)
    run(job, [answer(2)], "done-with-errors", 6.0)
    found = collected(job)
    page = Page(render_page([found]))
    lines = render(found["summary"]).splitlines()[1:]
    shown = [cell.strip() for line in lines for cell in re.split(r" {2,}", line) if cell]
    assert [cell for cell in shown if cell not in page.text] == []
    assert len(page.named("svg")) == 8
    marks = [path for path in page.named("path") if path["class"] == "mark"]
    assert len(marks) == 6
    assert {path["d"] for path in marks} == {"M769.2 0V1000"}  # 20 of 26 seconds


def test_the_page_needs_nothing_from_elsewhere(job):
    run(job, [answer(0), failure(1), answer(2)])
    page = page_of(job)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    attributes = {key for _, found in page.elements for key in found}
    assert not {key for key in attributes if key.startswith("on")}
    assert not attributes & {"src", "href", "srcset", "action", "background", "xlink:href"}
    assert not re.search(r"url\(|@import|https?:|//", page.style)
    assert "http:" not in page.html
    assert "https:" not in page.html
    [policy] = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_charts_and_tables_can_be_read_aloud(job):
    run(job, [answer(0), answer(1), answer(2)])
    page = page_of(job)
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert svg["aria-label"]
    assert len(page.named("title")) == len(page.named("desc")) + 1 == len(page.named("svg")) + 1
    assert "generated: 100 at most, 100 at the end" in page.text
    assert all(th["scope"] in {"row", "col"} for th in page.named("th"))
    [html] = page.named("html")
    assert html == {"lang": "en"}
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert all(late <= early + 1 for early, late in pairwise(levels))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out_in_the_light_and_in_the_dark(job, dark):
    style = page_of(job).style
    assert "@media (prefers-color-scheme: dark)" in style
    root = style.split("prefers-color-scheme: dark")[dark]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", root.partition("}")[0]))
    for ground in ("page", "card", "wash"):
        for name, least in [*dict.fromkeys(("ink", "soft", "bad"), 4.5).items(), ("accent", 3)]:
            pair = sorted(luminance(colours[each]) + 0.05 for each in (ground, name))
            assert pair[1] / pair[0] >= least, (ground, name)
    for number in range(1, 7):
        pair = sorted(luminance(colours[each]) + 0.05 for each in ("card", f"c{number}"))
        assert pair[1] / pair[0] >= 3


def test_hostile_text_is_shown_and_does_nothing(make_job, tmp_path):
    plain = make_job()
    run(plain, [answer(0), failure(1)], "failed", reason="x")
    harmless = [collected(plain) | {"command": "batchrun submit"}]
    harmless = [Page(render_page(jobs)) for jobs in (harmless, harmless * 2)]
    known = {name for page in harmless for name, _ in page.elements}
    attributes = {key for page in harmless for _, found in page.elements for key in found}

    source = tmp_path / "evil.jsonl"

    source.write_text("".join(json.dumps({"prompt": EVIL}) + "\n" for _ in range(2)))
    job = make_job(
        inputs=(InputFile.of(source),),
        input_format="jsonl",
        sampling=SamplingSpec(max_tokens=8, stop=(EVIL,)),
        prompt=PromptSpec(column="prompt", system=EVIL),
        output=OutputSpec(path=str(tmp_path / "out.jsonl"), format="jsonl"),
    )
    results = [answer(0, EVIL), failure(1, EVIL, EVIL)]
    run(job, results, EVIL, reason=EVIL, model=EVIL, varies=EVIL)
    found = collected(job) | {"command": EVIL}
    found["runs"][0]["setup"] |= {"cpu": EVIL, "versions": {EVIL: EVIL}, "gpus": [EVIL]}
    for page in (Page(render_page([found])), Page(render_page([found, found]))):
        assert {name for name, _ in page.elements} <= known
        assert {key for _, each in page.elements for key in each} <= attributes
        assert page.text.count("</script><script>alert(1)</script><img src=x onerror") >= 9
        assert r"&amp; \x1b[2J\x00\u202egnp\u202c\u200b\u2028\ufeff\U000e0041" in page.text
        assert "{{ 7*7 }} {% raw %}" in page.text
        hidden = {c for c in page.html if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl"}}
        assert hidden <= {"\n"}


def test_lines_of_a_text_stay_lines():
    assert visible("a\r\nb\tc\rd\x07") == "a\nb\tc\\rd\\x07"
    assert visible(3) == 3


def test_long_text_says_what_is_left_out(job):
    run(job, [answer(0, "begin" + "x" * 100_000 + "end"), answer(1)])
    page = page_of(job)
    assert "[... 98,508 characters left out ...]" in page.text
    assert "beginxxx" in page.text
    assert "xxxend" in page.text
    assert len(page.html) < 60_000
    assert shortened("short") == "short"


def test_a_job_that_never_ran(job):
    page = page_of(job)
    assert "0 of ? done" in page.text
    assert "Nothing was sampled over time: the job has not run yet." in page.text
    assert "No row has an answer yet." in page.text
    assert "Versions and machine not recorded" in page.text
    assert "Command not recorded" in page.text


@pytest.mark.parametrize("state", [None, "interrupted", "cancelled", "failed", "done"])
def test_a_job_in_any_state(job, state):
    results = [answer(0), answer(1), answer(2)] if state == "done" else [answer(0)]
    run(job, results, state, reason="the disk is full" if state == "failed" else None)
    if state is None:
        with Lease(job.path):
            page = page_of(job)
    else:
        page = page_of(job)
    assert {None: "running"}.get(state, state) in page.text
    assert ("the disk is full" in page.text) == (state == "failed")
    progress = [each for each in page.named("div") if each.get("class") == "progress"]
    assert len(progress) == (state != "done")
    assert "versions" not in page.text
    assert "batchrun 1.2.3" in page.text
    assert "a processor, at most 2 used" in page.text


def test_only_failed_rows(job):
    results = [failure(0), failure(1), failure(2, "it is null", "null_prompt")]
    run(job, results, "done-with-errors", 2.0, generated_tokens=0, steps=0)
    page = page_of(job)
    assert "prompt_too_long 2 rows" in page.text
    assert "null_prompt 1 row" in page.text
    assert "row 1 prompt two error it is too long" in page.text
    assert "row 2 prompt three error it is null" in page.text
    assert "No row has an answer yet." in page.text


def test_answers_stand_beside_the_prompts_of_their_rows(job):
    run(job, [answer(i, f"answer {i}") for i in range(3)])
    page = page_of(job)
    for row, prompt in enumerate(["one", "two", "three"]):
        assert f"row {row} prompt {prompt} answer answer {row}" in page.text


def test_each_sample_of_a_row_is_told_apart(make_job):
    job = make_job(n=2)
    run(job, [answer(0, f"answer {s}", sample=s) for s in (0, 1)])
    page = page_of(job)
    assert "row 0, sample 0 prompt one answer answer 0" in page.text
    assert "row 0, sample 1 prompt one answer answer 1" in page.text


def test_a_job_that_only_scores_has_no_answers_and_says_so(make_job):
    job = make_job(sampling=SamplingSpec(score="prompt"))
    scored = {"completion_tokens": 0, "finish_reason": "scored", "scores": Scores((-1.0,))}
    run(job, [answer(i, "", **scored) for i in range(3)], generated_tokens=0)
    page = page_of(job)
    assert "row 0 prompt one answer the answer is empty" in page.text
    assert "Tokens of completions" in page.text


def test_what_was_cut_off_is_marked(job):
    run(job, [answer(0, "and so", finish_reason="length")])
    assert "answer (cut off) and so" in page_of(job).text


def test_no_examples_leaves_all_of_them_out(job):
    run(job, [answer(0, "an answer"), failure(1, "an error")])
    page = page_of(job, examples=False)
    assert "an answer" not in page.text
    assert "an error" not in page.text
    assert "prompt_too_long 1 row" in page.text
    assert page.text.count("(--no-examples)") == 2


@pytest.mark.parametrize("gone", [True, False])
def test_an_input_that_changed_leaves_answers_without_prompts(job, prompts, gone):
    run(job, [answer(0, "first"), failure(1)])
    if gone:
        prompts.unlink()
    else:
        pq.write_table(pa.table({"id": [7, 8, 9], "prompt": ["other", "two", "three"]}), prompts)
    page = page_of(job)
    why = "can't be read" if gone else "the input has changed"
    assert re.search(rf"row 0 prompt not shown: [^<]*{why}.* answer first", page.text)
    assert "other" not in page.text


def test_a_page_stays_small_however_long_the_job(job):
    found = collected(job)
    found["runs"] = [
        {
            **found,
            "id": i,
            "started_at": 0.0,
            "ended_at": 1.0,
            "state": "interrupted",
            "reason": None,
            "wall_s": 1.0,
            "setup": None,
        }
        for i in range(1, 301)
    ]
    samples = {i: [figures(2.0 * at, running=at * i % 91) for at in range(1, 2001)] for i in (1, 2)}

    runs = [{"id": i, "stats": {}} for i in samples]
    found["timeline"] = timeline(runs, samples.__getitem__)
    found["examples"] = [
        {
            "row": i,
            "sample": 0,
            "prompt": "x" * 9999,
            "answer": "y" * 9999,
            "error": None,
            "finish_reason": "stop",
            "unread": None,
        }
        for i in range(EXAMPLES * SAMPLES)
    ]
    page = Page(render_page([found]))
    assert len(page.html.encode()) < 300_000
    assert "280 earlier runs are not listed" in page.text


def test_jobs_side_by_side(make_job):
    one, two = make_job(), make_job(seed=7, sampling=SamplingSpec(max_tokens=9, temperature=0.7))
    run(one, [answer(0, "red"), answer(1, "green"), answer(2)], seconds=20.0)
    run(two, [answer(0, "blue"), failure(1), answer(2)], "done-with-errors", 10.0)
    page = page_of(one, two)
    assert f"{one.id}, {two.id}" in page.text
    assert "wall clock 20.0 s 10.0 s 0.50x" in page.text
    assert "rows failed 0 1 prompt" not in page.text
    assert "rows failed 0 1 " in page.text  # nothing is a multiple of 0
    assert "seed 1 7" in page.text
    assert "sampling.max_tokens 8 9" in page.text
    assert "model.name" not in page.text.split("Parameters that differ")[1].split("Over time")[0]
    assert f"row 0 prompt one {one.id} red {two.id} blue" in page.text
    assert len([p for p in page.named("path") if p["class"] == "line s2"]) == 6


def test_rows_with_other_prompts_are_not_beside_each_other(make_job, tmp_path):

    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["one", "deux"]}), other)
    one, two = make_job(), make_job(inputs=(InputFile.of(other),))
    run(one, [answer(0, "a"), answer(1, "b")])
    run(two, [answer(0, "c"), answer(1, "d")])
    page = page_of(one, two)
    assert f"row 0 prompt one {one.id} a {two.id} c" in page.text
    assert f"row 1 prompt two {one.id} b row 1 prompt deux {two.id} d" in page.text
