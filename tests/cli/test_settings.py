"""Options from variables and files: which one wins, what is refused, and what errors name."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import batchrun
from batchrun.cli import cli, settings
from batchrun.cli.config import config_command
from batchrun.cli.options import sources
from batchrun.cli.plan import plan_command
from batchrun.cli.run import resume_command, submit_command
from batchrun.cli.settings import NOT_A_PROJECTS, SettingsError
from batchrun.errors import UserError
from batchrun.jobs import kinds
from batchrun.jobs.kinds import Choice, Integer, Option
from batchrun.options import OPTIONS


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a project's folder in it, where the commands run."""
    for name in [name for name in os.environ if name.startswith("BATCHRUN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    return project


def user_file(places: Path, text: str) -> Path:
    path = places.parent / "config" / "batchrun" / "batchrun.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def parsed(*arguments: object, command: click.Command = submit_command) -> click.Context:
    return command.make_context(command.name, [str(argument) for argument in arguments])


def value(name: str, *arguments: object) -> tuple[Any, str]:
    context = parsed(*arguments)
    given = context.params[name]
    return OPTIONS[name].read(given) if name in OPTIONS else given, sources(context)[name]


# --- which one wins ------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(6))
def test_the_first_of_these_that_has_a_value_wins(
    first: int, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, project = places / "job.toml", places / "batchrun.toml"
    job.write_text('inputs = ["in.jsonl"]\n' + "max-tokens = 3\n" * (first <= 2))
    project.write_text("max-tokens = 4\n" * (first <= 3))
    user = user_file(places, "max_tokens = 5\n" * (first <= 4))
    if first <= 1:
        monkeypatch.setenv("BATCHRUN_MAX_TOKENS", "2")
    found = value("max_tokens", job, *["--max-tokens", "1"] * (first == 0))
    assert (
        found
        == [
            (1, "command line"),
            (2, "BATCHRUN_MAX_TOKENS"),
            (3, f"{job}: max-tokens"),
            (4, f"{project}: max-tokens"),
            (5, f"{user}: max_tokens"),
            (None, "default"),
        ][first]
    )


def sample(option: Option) -> tuple[str, Any]:
    """A value as text, and as TOML has it, that is not the default."""
    kind = option.kind
    if kind == kinds.FLAG:
        return ("0", False) if option.default else ("true", True)
    if isinstance(kind, Integer):
        return "3", 3
    if isinstance(kind, Choice):
        return ([*kind.words][-1],) * 2
    known = {
        kinds.NUMBER: ("0.5", 0.5),
        kinds.AT_LEAST_0: ("2", 2),
        kinds.COUNT_OR_AUTO: ("2", 2),
        kinds.DEVICE: ("cpu",) * 2,
        kinds.DEVICES: ("cpu:2",) * 2,
        kinds.TEXT: ("some text",) * 2,
        kinds.TEXT_OR_FILE: ("some text",) * 2,
        kinds.LABEL: ("a=b",) * 2,
    }
    by_name: dict[str, tuple[str, Any]] = {
        "template_args": ('{"a": 1, "b": "x"}', {"a": 1, "b": "x"}),
        "kv_budget": ("1MiB",) * 2,
        "page_size": ("1MiB",) * 2,
        "json_schema": ('{"type": "object"}',) * 2,
        "regex": ("a+",) * 2,
        "choices": ('["a", "b,c"]', ["a", "b,c"]),
        "labels": ('["a", "b,c"]', ["a", "b,c"]),
        "grammar": ('start: "a"',) * 2,
        "model": ("owner/name",) * 2,
        "draft_model": ("owner/name",) * 2,
        "output": ("/out.jsonl",) * 2,
    }
    return by_name.get(option.name) or known[kind]  # type: ignore[index]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_can_be_set_by_a_variable_and_by_a_file(
    name: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = OPTIONS[name]
    text, typed = sample(option)
    words = [option.flag, text]
    if option.kind == kinds.FLAG:
        words = [option.flag if typed else option.flag.replace("--", "--no-")]
    if option.kind == kinds.NAMED:
        words = [f"{option.flag}={key}={json.dumps(item)}" for key, item in typed.items()]
    wanted, _ = value(name, "in.jsonl", *words)
    assert wanted not in (None, option.default)

    job = places / "job.toml"
    key = option.flag[2:]
    job.write_text(f'inputs = "in.jsonl"\n{key} = {toml(typed)}\n')
    assert value(name, job) == (wanted, f"{job}: {key}")
    job.write_text(f'inputs = "in.jsonl"\n{name} = {toml(typed)}\n')
    assert value(name, job) == (wanted, f"{job}: {name}")

    variable = f"BATCHRUN_{key.replace('-', '_').upper()}"
    monkeypatch.setenv(variable, text)
    assert value(name, "in.jsonl") == (wanted, variable)


def toml(given: Any) -> str:
    if isinstance(given, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in given.items()) + "}"
    return json.dumps(given)


@pytest.mark.parametrize("name", ["wait", "again", "dry_run", "json"])
def test_what_is_no_jobs_option_can_be_set_too(
    name: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    param, wanted = {"json": "as_json"}.get(name, name), name != "wait"
    job = places / "job.toml"
    job.write_text(f'inputs = "in.jsonl"\n{name.replace("_", "-")} = {json.dumps(wanted)}\n')
    assert value(param, job)[0] is wanted
    monkeypatch.setenv(f"BATCHRUN_{name.upper()}", "0" if wanted else "1")
    assert value(param, job) == (not wanted, f"BATCHRUN_{name.upper()}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one, two", ("one, two",)),
        ('["one", "two"]', ("one", "two")),
        ("[", ("[",)),
        ('{"a": 1}', ('{"a": 1}',)),
    ],
)
def test_a_variable_for_an_option_that_is_repeated(
    text: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHRUN_STOP", text)
    assert value("stop", "in.jsonl")[0] == wanted


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUN_MAX_TOKENS", "")
    assert value("max_tokens", "in.jsonl") == (None, "default")


def test_in_a_command_of_on_done_the_output_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUN_OUTPUT", "/out.jsonl")
    assert value("output", "in.jsonl")[0] == "/out.jsonl"
    monkeypatch.setenv("BATCHRUN_JOB", "a-job")
    assert value("output", "in.jsonl") == ("", "default")


def test_a_command_of_on_done_gives_no_job_a_command_from_the_users_file(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_file(places, 'on-done = "batchrun submit in.jsonl"\n')
    assert value("on_done", "in.jsonl")[0] == "batchrun submit in.jsonl"
    monkeypatch.setenv("BATCHRUN_JOB", "a-job")  # or it would submit jobs for ever
    assert value("on_done", "in.jsonl") == (None, "default")


# --- job files -----------------------------------------------------------------------------------


def test_paths_in_a_job_file_are_relative_to_it(places: Path) -> None:
    folder = places / "a [b]"
    (folder / "models" / "tiny").mkdir(parents=True)
    (folder / "in.jsonl").touch()
    (folder / "schema.json").write_text('{"type": "object"}')
    (folder / "job.toml").write_text(
        'inputs = ["in.jsonl", "part-*.jsonl", "/data/x.csv", "s3://bucket/y.csv", "-"]\n'
        'model = "models/tiny"\noutput = "out/o.jsonl"\njson-schema = "schema.json"\n'
        'draft-model = "owner/name"\n'
    )
    found = parsed("a [b]/job.toml").params
    assert found["inputs"] == (
        f"{folder}/in.jsonl",
        f"{places}/a [[]b]/part-*.jsonl",
        "/data/x.csv",
        "s3://bucket/y.csv",
        "-",
    )
    assert found["model"] == f"{folder}/models/tiny"
    assert found["output"] == f"{folder}/out/o.jsonl"
    assert json.loads(found["json_schema"]) == {"type": "object"}
    assert found["draft_model"] == "owner/name"  # there is no such folder: a hub id


def test_inputs_beside_a_job_file_replace_its_own(places: Path) -> None:
    job = places / "job.toml"
    job.write_text('inputs = ["in.jsonl"]\nmax-tokens = 3\n')
    found = parsed("other.jsonl", job, command=plan_command).params
    assert (found["inputs"], found["max_tokens"]) == (("other.jsonl",), 3)
    job.write_text("max-tokens = 3\n")
    with pytest.raises(SettingsError, match=r"job\.toml names no inputs") as raised:
        parsed("job.toml")
    assert "inputs = [" in str(raised.value.hint)
    with pytest.raises(SettingsError, match="one job file"):
        parsed("job.toml", "other.toml")


BAD: dict[str, tuple[bytes, str]] = {
    "no TOML": (b"max-tokens 3\n", r"job\.toml is not TOML: .*line 1"),
    "a web page": (b"<!doctype html>\n", r"job\.toml is not TOML"),
    "not UTF-8": (b'system = "\xff"\n', r"job\.toml is not UTF-8 text, at byte 10"),
    "UTF-16": ("model = 'x'".encode("utf-16"), r"job\.toml is not UTF-8 text"),
    "too large": (b"# " + b"x" * (1 << 20), r"job\.toml is larger than 256 KiB"),
    "a long key": (b"a." * 100_000 + b"a = 1", r"job\.toml has a line with more than 500 dots"),
    "a long key inside": (b"a = {" + b"a." * 100_000 + b"a = 1}", r"more than 500 dots"),
    "too deep": (b"stop = " + b"[" * 100_000, r"job\.toml is not TOML"),
    "a huge number": (b"max-tokens = " + b"9" * 100_000, r"job\.toml is not TOML"),
    "twice": (b"n = 1\nn = 2\n", r"job\.toml is not TOML"),
    "two spellings": (b"max-tokens = 1\nmax_tokens = 2\n", r"max_tokens is given twice"),
    "unknown": (b"max-token = 1\n", r"there is no option `max-token`; did you mean `max-tokens`\?"),
    "nothing near": (b"zzzzzz = 1\n", r"there is no option `zzzzzz`$"),
    "a table": (b"[sampling]\nmax-tokens = 1\n", r"no option `sampling`"),
    "text for a number": (b'max-tokens = "3"\n', r"max-tokens: '3' is not a whole number"),
    "a fraction": (b"max-tokens = 3.5\n", r"max-tokens: 3\.5 is not a whole number"),
    "a flag for a number": (b"max-tokens = true\n", r"max-tokens: True is not a whole number"),
    "a number for a flag": (b"chat = 1\n", r"chat: 1 is not a flag"),
    "a number for text": (b"model = 3\n", r"model: 3 is not text"),
    "a time": (b"model = 2026-01-01\n", r"model: .* is not text"),
    "out of range": (b"n = 0\n", r"n: 0 is less than 1"),
    "no choice": (b'dtype = "float64"\n', r"dtype: 'float64' is not one of 'auto'"),
    "a bad item": (b"stop = [1]\n", r"stop: 1 is not text"),
    "a bad switch": (b'wait = "no"\n', r"wait: 'no' is neither true nor false"),
    "no mapping": (b'template-arg = "a=1"\n', r"template-arg: 'a=1' is not a mapping"),
    "a time in it": (b"template-arg = {a = 2026-01-01}\n", r"template-arg: .*serializable"),
    "null characters": (b'on-done = "a\\u0000b"\n', r"on-done: it contains a null character"),
    "no schema": (b'json-schema = "/dev/zero"\n', r"json-schema: /dev/zero is not a regular file"),
    "inputs that are none": (b"inputs = [1]\n", r"inputs: write a list of paths"),
    "an empty input": (b'inputs = [""]\n', r"inputs: write a list of paths"),
    "a job file as input": (b'inputs = ["job.toml"]\n', r"inputs: a job file cannot be an input"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_job_file_is_refused_by_name(name: str, places: Path) -> None:
    content, message = BAD[name]
    path = places / "job.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as raised:
        parsed("job.toml")
    assert str(path) in raised.value.message
    assert len(raised.value.message) < 500


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "loop"])
def test_what_is_no_file_is_refused_and_waits_for_nobody(kind: str, places: Path) -> None:
    path = places / "job.toml"
    {
        "missing": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    with pytest.raises(SettingsError, match=re.escape(str(path))):
        parsed("job.toml")


# --- errors in values name where these come from -------------------------------------------------


def test_errors_name_the_variable_or_the_file(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "in.jsonl").write_text('{"prompt": "one"}\n')
    (places / "batchrun.toml").write_text('best-of = 2\nmodel = "./none"\n')
    source = f"{places / 'batchrun.toml'}: best-of"
    for words, said in ([], f" (from {source})"), (["--best-of=2"], ""):
        arguments = ["submit", "in.jsonl", "--n=3", *words]
        shown = CliRunner().invoke(cli, arguments, standalone_mode=False)
        assert str(shown.exception) == f"--best-of{said} 2 is less than --n 3"
    for variable, text in {"MAX_TOKENS": "many", "CHAT": "perhaps", "DTYPE": "int3"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(f"BATCHRUN_{variable}", text)
            with pytest.raises(click.UsageError) as raised:
                parsed("in.jsonl")
            said = raised.value.format_message()
        assert f"(from BATCHRUN_{variable})" in said
        assert text in said


def test_a_misspelled_variable_is_told_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATCHRUN_MAX_TOKEN", "3")
    monkeypatch.setenv("BATCHRUN_CI_RUNNER", "x")
    monkeypatch.setenv("BATCHRUN_HOME", "/home")
    monkeypatch.setenv("BATCHRUN_STALL_SECONDS", "600")
    parsed("in.jsonl")
    told = capsys.readouterr().err.splitlines()
    assert told == ["BATCHRUN_MAX_TOKEN is not a known variable; did you mean BATCHRUN_MAX_TOKENS?"]


def test_no_variable_of_an_option_means_something_else() -> None:
    options = {
        key.upper() for name in (*OPTIONS, *settings.SWITCHES) for key in settings.keys_of(name)
    }
    assert options & settings.OTHERS == set()


def test_help_is_shown_whatever_the_files_say(places: Path) -> None:
    (places / "batchrun.toml").write_text("broken")
    for command in ("submit", "plan", "config"):
        assert CliRunner().invoke(cli, [command, "--help"]).exit_code == 0


# --- a project's file ----------------------------------------------------------------------------


def test_a_projects_file_is_looked_for_up_to_a_repositorys_root_or_the_home(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = places / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    file = places / "batchrun.toml"
    file.write_text("n = 2\nmax-tokens = 5\n")
    assert value("n", "in.jsonl") == (2, f"{file}: n")
    assert capsys.readouterr().err == f"{file} sets max-tokens, n\n"
    (places / "a" / ".git").mkdir()
    assert value("n", "in.jsonl") == (1, "default")
    (places / "a" / "batchrun.toml").write_text("n = 3\n")  # at the root itself
    assert value("n", "in.jsonl")[0] == 3
    (deep / "batchrun.toml").write_text("n = 4\n")  # the nearest
    assert value("n", "in.jsonl")[0] == 4
    for path in (deep / "batchrun.toml", places / "a" / "batchrun.toml"):
        path.unlink()
    (places / "a" / ".git").rmdir()
    file.unlink()
    (places.parent.parent / "batchrun.toml").write_text("n = 5\n")  # above the home
    try:
        assert value("n", "in.jsonl")[0] == 1
    finally:
        (places.parent.parent / "batchrun.toml").unlink()


def test_without_a_working_folder_there_is_no_project(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = places / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert value("n", "in.jsonl") == (1, "default")


@pytest.mark.parametrize("name", NOT_A_PROJECTS)
def test_what_a_projects_file_can_not_set(
    name: str, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have come with somebody's data."""
    line = f"{name} = {toml(sample(OPTIONS[name])[1])}\n"
    inside = places / "data"
    inside.mkdir()
    monkeypatch.chdir(inside)
    path = places / "batchrun.toml"
    path.write_text(line)
    with pytest.raises(SettingsError, match="can't be set by a file that is found") as raised:
        parsed("in.jsonl")
    assert f"{path}: {name}" in raised.value.message
    path.unlink()
    user = user_file(places, line)
    assert value(name, "in.jsonl")[1] == f"{user}: {name}"


def test_a_projects_file_names_no_models_in_stores(places: Path) -> None:
    for key in ("model", "draft-model"):
        (places / "batchrun.toml").write_text(f'{key} = "s3://bucket/model"\n')
        with pytest.raises(SettingsError, match="a URL connects to other machines"):
            parsed("in.jsonl")


def test_inputs_are_a_job_files(places: Path) -> None:
    (places / "batchrun.toml").write_text('inputs = ["in.jsonl"]\n')
    with pytest.raises(SettingsError, match="only a job file has inputs"):
        parsed("in.jsonl")


def test_a_projects_file_that_others_could_have_written_is_left_out(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = places / "batchrun.toml"
    path.write_text("n = 2\n")
    path.chmod(0o666)
    assert value("n", "in.jsonl")[0] == 1
    assert capsys.readouterr().err == f"{path} is ignored: another user could have written it\n"
    path.chmod(0o600)
    assert value("n", "in.jsonl")[0] == 2
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    if os.getuid() == 0:
        os.chown(path, 1234, 1234)
    assert value("n", "in.jsonl")[0] == 1


# --- commands that read no files -----------------------------------------------------------------


def test_a_resumed_job_keeps_what_it_was_submitted_with(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "batchrun.toml").write_text("broken")
    for name in ("MAX_NUM_SEQS", "KV_BUDGET", "DEVICES", "ON_DONE", "OUTPUT"):
        monkeypatch.setenv(f"BATCHRUN_{name}", "2")
    monkeypatch.setenv("BATCHRUN_WAIT", "0")
    found = parsed(command=resume_command).params
    assert {name: found[name] for name in ("max_num_seqs", "kv_budget", "devices", "on_done")} == (
        dict.fromkeys(("max_num_seqs", "kv_budget", "devices", "on_done"))
    )
    assert (found["output"], found["wait"]) == (None, False)


def test_python_reads_neither_variables_nor_files(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "batchrun.toml").write_text("broken")
    monkeypatch.setenv("BATCHRUN_MAX_TOKENS", "many")
    with pytest.raises(UserError, match=r"none\.jsonl: there is no such file"):
        batchrun.submit("none.jsonl")


# --- batchrun config -----------------------------------------------------------------------------


def test_config_shows_each_option_and_its_source(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "job.toml").write_text('inputs = ["in.jsonl"]\nsystem = "be\\u001b[2J brief"\n')
    monkeypatch.setenv("BATCHRUN_MODEL", "other")
    run = CliRunner().invoke(cli, ["config", "job.toml", "--seed", "7"])
    lines = [re.split(r"\s{2,}", line) for line in run.stdout.splitlines()]
    assert ["inputs", f"{places}/in.jsonl"] in lines
    assert ["--seed", "7", "command line"] in lines
    assert ["--model", '"other"', "BATCHRUN_MODEL"] in lines
    assert ["--dtype", '"auto"', "default"] in lines
    assert "\x1b" not in run.stdout
    shown = json.loads(CliRunner().invoke(cli, ["config", "job.toml", "--json"]).stdout)
    assert shown["inputs"] == [f"{places}/in.jsonl"]
    assert shown["options"].keys() == OPTIONS.keys()
    assert shown["options"]["system"]["source"] == f"{places}/job.toml: system"
    assert shown["options"]["max_tokens"] == {"value": None, "source": "default"}


def test_config_takes_the_options_of_submit() -> None:
    for name in OPTIONS:
        assert any(param.name == name for param in config_command.params)
