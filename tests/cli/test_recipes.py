"""The recipes of examples/ as their pages show them: the commands run, and what comes out is so.

None of the tests depends on the words of an answer.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = {page.parent.name: page for page in sorted(ROOT.glob("examples/*/README.md"))}
_SLOW = ("judge", "synthesise", "translate")
RUN = [pytest.param(n, marks=pytest.mark.long) if n in _SLOW else n for n in PAGES]
LABELS = pa.dictionary(pa.int32(), pa.string())


def page(name):
    return PAGES[name].read_text(encoding="utf-8")


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)


def words(name):
    """The words of all commands that the page shows."""
    return shlex.split("\n".join(blocks(name, "sh")))


def option(name, flag):
    found = words(name)
    return found[found.index(flag) + 1]


def source(name):
    found = words(name)
    return found[found.index("submit") + 1]


def outputs(name):
    return re.findall(r"--output (\S+)", "\n".join(blocks(name, "sh")))


def made(name):
    """What running the recipe in place leaves behind."""
    return [*outputs(name), "questions.parquet"]


def read(path):
    """Column names, and rows: a CSV's as texts."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return table.column_names, table.to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            names, *rows = csv.reader(file)
            return names, [dict(zip(names, row, strict=True)) for row in rows]
        rows = [json.loads(line) for line in file]
        return list(rows[0]), rows


@pytest.fixture(scope="module")
def ran(model_cache, smollm2, tmp_path_factory):
    """A copy of a recipe's folder in which all that its page shows has run, once for all tests."""
    assert smollm2.path.parent == model_cache
    home, commands = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("bin")
    (home / "models").symlink_to(model_cache)
    for command, module in (("batchrun", "-m batchrun"), ("python", "")):
        script = commands / command
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "BATCHRUN_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }

    @cache
    def run(name):
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(PAGES[name].parent, folder, ignore=lambda *_: made(name))
        python = [sys.executable, "-W", "error", "-c"]
        shown = re.findall(r"^```(sh|python)\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)
        for language, text in shown:
            done = subprocess.run(
                [*(["sh", "-ec"] if language == "sh" else python), text],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (text, done.stdout, done.stderr)
        return folder

    return run


def test_every_recipe_has_its_line_in_the_table_with_options_of_its_command():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| \[(\w+)\]\(\.\./examples/(\w+)/README\.md\) \| `(.*?)` \|", text, re.M)
    assert [(name, folder) for name, folder, _ in lines] == [(name, name) for name, _, _ in lines]
    assert sorted(name for name, _, _ in lines) == list(PAGES)
    for name, _, options in lines:
        assert set(shlex.split(options)) <= set(words(name)), name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/recipes.md)" in readme
    assert set(re.findall(r"\(examples/(\w+)/README\.md\)", readme)) <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_what_goes_in_is_small_and_shown(name):
    folder = PAGES[name].parent
    assert 8 <= len(read(folder / source(name))[1]) <= 24
    shown = dict(re.findall(r"`([\w.]+)`:\n\n```\w*\n(.*?)^```$", page(name), re.DOTALL | re.M))
    for file, text in shown.items():
        whole = (folder / file).read_text(encoding="utf-8")
        assert whole.startswith(text), file
        assert file == source(name) or whole == text, file
    tables = [file for file, _ in tables_of(name)]
    assert source(name) in [*shown, *tables]


def tables_of(name):
    """Each table that the page shows, with its file's name: a list of rows, the names first."""
    found = re.findall(r"`([\w.]+)`[^\n]*:\n\n((?:\|[^\n]*\n)+)", page(name))
    for file, text in found:
        names, _, *rows = [
            [cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()
        ]
        yield file, [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", RUN)
def test_the_page_shows_the_columns_and_rows_that_come_out(name, ran):
    folder = ran(name)
    tables = dict(tables_of(name))
    assert set(made(name)) & set(tables)
    inputs = read(folder / source(name))[0]
    for file, shown in tables.items():
        names, rows = read(folder / file)
        assert set(shown[0]) <= set(names), file
        if file == "questions.parquet":  # which rows there are depends on the answers
            continue
        assert len(shown) <= len(rows)
        for printed, row in zip(shown, rows, strict=False):
            for column in set(printed) & {*inputs}:
                assert printed[column] == str(row[column]), (file, column)
    listed = re.findall(r"The columns of `([\w.]+)`: (.*)\.\n", page(name))
    assert listed
    for file, text in listed:
        assert re.findall(r"`(\w+)`", text) == read(folder / file)[0], file


@pytest.mark.parametrize("name", RUN)
def test_every_row_has_an_answer(name, ran):
    folder = ran(name)
    given = len(read(folder / source(name))[1])
    assert len(outputs(name)) == words(name).count("submit")
    for output in outputs(name):
        names, rows = read(folder / output)
        assert len(rows) == given * (int(option(name, "--n")) if "sample" in names else 1)
        for row in rows:
            assert row["completion"] or row["finish_reason"] == "scored", row
            for column in names:
                assert not (column.endswith("error") and row[column]), row


def test_classify_gives_every_review_one_of_the_labels(ran):
    table = pq.read_table(ran("classify") / "labelled.parquet")
    labels = option("classify", "--choices").split(",")
    assert table.schema.field("parsed").type == LABELS
    assert table["parsed"].combine_chunks().dictionary.to_pylist() == labels
    assert table["parsed"].to_pylist() == table["completion"].to_pylist()
    assert all(logprob < 0 for logprob in table["choice_logprob"].to_pylist())


def test_extract_gives_fields_of_the_schema(ran):
    folder = ran("extract")
    table = pq.read_table(folder / "extracted.parquet")
    fields = [("item", pa.string()), ("price", pa.int64()), ("city", pa.string())]
    assert table.schema.field("parsed").type == pa.struct(fields)
    schema = json.loads((folder / option("extract", "--json-schema")).read_text())
    assert set(schema["properties"]) == {name for name, _ in fields}
    for row in table.to_pylist():
        jsonschema.validate(row["parsed"], schema)
        assert json.loads(row["completion"]) == row["parsed"]


def test_score_says_which_answer_is_likeliest(ran):
    folder = ran("score")
    rows = pq.read_table(folder / "scored.parquet").to_pylist()
    assert {row["finish_reason"] for row in rows} == {"scored"}
    for row in rows:
        assert row["score_sum"] == pytest.approx(sum(row["score_logprobs"]))
        assert row["score_tokens"] == len(row["score_logprobs"]) > 0
    script = [sys.executable, folder / "best.py"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    best = {row["question"]: row for row in sorted(rows, key=lambda row: row["score_sum"])}
    said = {line[:36].strip(): line[36:].split()[-2] for line in shown}
    assert said == {name: f"{row['score_sum']:.2f}" for name, row in best.items()}


def test_translate_answers_with_one_sentence(ran):
    _, rows = read(ran("translate") / "translated.csv")
    pattern = re.compile(option("translate", "--regex"))
    for row in rows:
        assert row["finish_reason"] == "length" or pattern.fullmatch(row["completion"]), row


@pytest.mark.long
def test_judge_reads_the_first_jobs_answers(ran, tokenizer):
    folder = ran("judge")
    names, answers = read(folder / "answers.jsonl")
    judged = pq.read_table(folder / "judged.parquet")
    assert judged.select(names).to_pylist() == answers
    assert judged.schema.field("judge_parsed").type == LABELS
    assert {*judged["judge_parsed"].to_pylist()} <= {"yes", "no"}
    template = words("judge")[-1]
    assert "{completion}" in template
    for row in judged.to_pylist():
        assert row["judge_prompt_tokens"] == len(tokenizer.encode(template.format(**row)))


@pytest.mark.long
def test_synthesise_draws_questions_of_the_grammar_and_keeps_one_of_equal_ones(ran):
    folder = ran("synthesise")
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    openings = re.findall(r'"([A-Z][\w ]*)"', (folder / "question.lark").read_text())
    form = re.compile(rf"(?:{'|'.join(openings)}) [a-z][a-zA-Z']*(?: [a-zA-Z']+)*\?")
    assert openings
    whole = [row for row in samples if row["finish_reason"] == "stop"]
    assert all(form.fullmatch(row["completion"]) for row in whole)
    assert [row["sample"] for row in samples[:8]] == list(range(8))
    assert len({row["completion"] for row in samples[:8]}) > 1  # the temperature has an effect
    table = pq.read_table(folder / "questions.parquet")
    kept = [question.casefold() for question in table["question"].to_pylist()]
    assert len(set(kept)) == len(kept)
    assert set(kept) == {row["completion"].casefold() for row in whole}


def test_the_first_of_equal_questions_is_kept_and_cut_ones_are_not(tmp_path):
    samples = {
        "topic": ["a", "a", "b", "b", "c"],
        "completion": ["Can I pay?", "How", "can I pay?", "Why not?", "Can I pay?"],
        "finish_reason": ["stop", "length", "stop", "stop", "stop"],
    }
    pq.write_table(pa.table(samples), tmp_path / "samples.parquet")
    script = ROOT / "examples" / "synthesise" / "deduplicate.py"
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "2 different questions in 5 samples\n"
    assert pq.read_table(tmp_path / "questions.parquet").to_pylist() == [
        {"topic": "a", "question": "Can I pay?"},
        {"topic": "b", "question": "Why not?"},
    ]
