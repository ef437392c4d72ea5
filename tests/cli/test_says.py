"""What the command says to a user who is new to it, or mistyped something."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.cli import COMMANDS, main
from batchrun.cli.mistyped import _SYNONYMS
from batchrun.cli.options import TextOrFile
from batchrun.errors import ModelError
from batchrun.jobs.errors import InputError, JobError
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import Lease
from batchrun.jobs.rows.source import expand_inputs
from batchrun.jobs.rows.store import unnoted
from batchrun.models.resolve import resolve
from batchrun.prompts.template import Template, doubled
from batchrun.specs import modelless_spec, read_options
from batchrun.submission import check_free
from tests.cli.conftest import CommandLine


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0), capsys.readouterr().err.splitlines()


def test_batchrun_alone_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        assert (ended.value.code, shown.err) == (0, "")
        assert "Usage: batchrun [OPTIONS] COMMAND [ARGS]..." in shown.out
        assert all(f"\n  {name} " in shown.out for name in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("submti", "did you mean batchrun submit?"),
        ("status", "did you mean batchrun list or batchrun watch?"),
        ("run", "did you mean batchrun submit?"),
        ("kill", "did you mean batchrun cancel?"),
        ("delte", "did you mean batchrun rm?"),
        ("qwertz", "batchrun --help lists the commands"),
    ],
)
def test_a_command_that_is_not_there(
    capsys: pytest.CaptureFixture[str], typed: str, hint: str
) -> None:
    expected = [f"error: there is no command '{typed}'", f"hint: {hint}"]
    assert said(capsys, typed, "x.jsonl", "--json") == (2, expected)


def test_synonyms_are_of_commands_that_are_there() -> None:
    for commands in _SYNONYMS.values():
        assert all(name in COMMANDS or name.startswith("--") for name in commands)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--max-token", "did you mean --max-tokens?"),
        ("--max_tokens", "did you mean --max-tokens?"),
        ("--temprature", "did you mean --temperature?"),
        ("--no-draft", "did you mean --no-drafts?"),
        ("--qwertz", "batchrun submit --help"),
    ],
)
def test_an_option_that_is_not_there(
    capsys: pytest.CaptureFixture[str], typed: str, hint: str
) -> None:
    expected = [f"error: there is no option {typed}", f"hint: {hint}"]
    assert said(capsys, "submit", "x.jsonl", typed, "4") == (2, expected)


def test_a_template_or_system_message_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Summarise:\n{text}\n\n", encoding="utf-8")
    read = TextOrFile().convert
    assert read(f"@{path}", None, None) == "Summarise:\n{text}\n"
    assert read("@@home {text}", None, None) == "@home {text}"
    assert read("{text} @ noon", None, None) == "{text} @ noon"
    path.write_bytes(b"\xff")
    for value, said in ((f"@{path}", "not UTF-8"), ("@nowhere", "'nowhere' can't be read")):
        with pytest.raises(click.BadParameter, match=said):
            read(value, None, None)


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (
            {"id": ["a1"], "n": [1], "title": ["x"], "Question": ["Why?"]},
            "--prompt-column Question (or title); or build them from columns: "
            "--template '... {Question}'",
        ),
        (
            {"row_id": ["a-very-long-identifier"], "kind": ["x"], "abstract of it": ["Long " * 9]},
            "--prompt-column 'abstract of it' (or kind); or",
        ),
        ({"id": [1], "dialog": [[{"role": "user", "content": "Hi"}]]}, "--prompt-column dialog"),
        ({"id": ["a"]}, "--prompt-column id; or"),
        ({"n": [1]}, "--prompt-column NAME; or --template TEXT"),
        ({"n": [1], "prompts": ["x"]}, "did you mean 'prompts'?"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_without_a_column_of_prompts_those_that_may_hold_them_are_named(
    tmp_path: Path, columns: dict[str, list[object]], hint: str, suffix: str
) -> None:
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(InputError) as missing:
        modelless_spec([str(path)], tmp_path, read_options({}), log=lambda _: None, noted=unnoted)
    assert "the input has no column 'prompt'" in str(missing.value)
    assert hint in str(missing.value.hint)


@pytest.mark.parametrize("state", ["queued", "running"])
def test_the_same_work_that_runs_already_is_to_be_watched_not_resumed(
    batchrun: CommandLine, state: str
) -> None:
    job = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", ["a"])))
    job.set_state(state)
    same = f"same work, and is {state}"
    with Lease(job.path), pytest.raises(JobError, match=same) as refused:
        check_free(batchrun.home, job.spec(), again=False)
    assert f"batchrun watch {job.id}" in str(refused.value.hint)
    assert f"batchrun cancel {job.id}" in str(refused.value.hint)
    assert "--again" in str(refused.value.hint)
    assert "resume" not in str(refused.value.hint)


def test_a_missing_input_is_named_as_it_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match=r"^\./row\.jsonl: there is no such") as missing:
        expand_inputs(["./row.jsonl"])
    assert missing.value.hint == "did you mean 'rows.jsonl'?"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2", "did you mean --model smollm2-135m-instruct?"),
        ("SmolLM2-135M", "did you mean --model smollm2-135m-instruct?"),
        ("./my-modle", "did you mean --model my-model?"),
        ("./my-model/config.jsn", "config.json?"),
        ("qwen3", "give a local folder or .gguf file to --model"),
    ],
)
def test_a_model_whose_name_is_mistyped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, hint: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model") as missing:
        resolve(name, tmp_path / "cache")
    assert hint in str(missing.value.hint)


@pytest.mark.parametrize(
    ("template", "meant"),
    [
        ('{"text": "{text}"}', '{{"text": "{text}"}}'),
        ('{"a": {"b": "{text}"}}', '{{"a": {{"b": "{text}"}}}}'),
        ('{{"a": {text}', '{{"a": {text}'),
        ("see {x y}: {text}", "see {{x y}}: {text}"),
        ('{"text": 1}', None),
        ("{text}", None),
    ],
)
def test_the_template_that_was_meant(template: str, meant: str | None) -> None:
    assert doubled(template) == (None if meant == template else meant)
    if meant is not None:
        assert Template(meant).columns == ["text"]


def test_a_template_with_json_in_it_is_refused_with_one_that_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    code, lines = said(capsys, "submit", str(path), "--template", '{"text": "{text}"}')
    assert code == 2
    assert lines[0].endswith('; did you mean this? {{"text": "{text}"}}')
    code, lines = said(capsys, "submit", str(path), "--template", '{ "a" }: {text}')
    assert lines[-1] == """hint: double the literal braces: --template '{{ "a" }}: {text}'"""


@pytest.mark.parametrize(
    ("options", "is_told"),
    [
        ({"template": "{text} Sentiment:", "choices": "good,bad,mixed"}, True),
        ({"template": "{text} Sentiment:", "choices": '[" good", " bad"]'}, False),
        ({"template": "{text} Sentiment:\n", "choices": "good,bad"}, False),
        ({"template": "{text} Sentiment:", "choices": "good,bad", "chat": True}, False),
        ({"template": "{text}", "choices": "good,bad"}, False),
        ({"template": "{text} Sentiment:"}, False),
    ],
)
def test_choices_right_behind_a_word_are_advised_against(
    tmp_path: Path, options: dict[str, object], is_told: bool
) -> None:
    path, lines = tmp_path / "in.jsonl", list[str]()
    path.write_text('{"text": "Nice."}\n')
    modelless_spec([str(path)], tmp_path, read_options(options), log=lines.append, noted=unnoted)
    expected = (
        "the choices follow ':' without a space, which models rarely write: give them as "
        """--choices '[" good", " bad", ...]', or add --chat"""
    )
    assert lines == [expected] * is_told
