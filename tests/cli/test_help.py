"""Help is quick, complete, and says what the commands do."""

import importlib
import re
import resource
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from batchrun.cli import COMMANDS, cli
from batchrun.cli.errors import ExitStatus
from batchrun.jobs.spec import OPTIONS


def test_help_answers_in_under_half_a_second():
    """Of processor time, which others that use the machine do not lengthen by much."""
    seconds = []
    for _ in range(3):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "batchrun", "--help"], capture_output=True, check=True
        )
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["stats", "--help"]])
def test_nothing_heavy_is_imported(arguments, tmp_path):
    code = (
        "import sys, batchrun.cli\n"
        "try: batchrun.cli.main(sys.argv[1:])\n"
        "finally: print({'torch', 'transformers'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"BATCHRUN_HOME": str(tmp_path)},
    )
    assert shown.stdout.splitlines()[-1] == "set()"


def test_help_names_every_command_and_exit_code():
    text = CliRunner().invoke(cli, ["--help"]).output
    for name, (_, line) in COMMANDS.items():
        assert f"  {name}" in text
        assert line in text
    codes = [word for word in text.split("Exit codes:")[1].split() if word.isdigit()]
    assert [int(code) for code in codes] == list(ExitStatus)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_table_is_the_first_line_of_the_commands_own_help(name):
    module, line = COMMANDS[name]
    command = getattr(importlib.import_module(module), f"{name}_command")
    assert isinstance(command, click.Command)
    first = command.help.splitlines()[0]
    assert first.startswith(line.removesuffix("."))


def test_every_option_of_submit_has_help_and_stands_in_a_section():
    command = importlib.import_module("batchrun.cli.run").submit_command
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert [param.opts for param in options if not param.help] == []
    assert [param.opts for param in options if not hasattr(param, "section")] == []
    text = CliRunner().invoke(cli, ["submit", "--help"]).output
    for param in options:
        assert param.opts[0] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_has_a_default_shows_it(name):
    """In brackets at the end of its help, and nowhere else."""
    module, _ = COMMANDS[name]
    command = getattr(importlib.import_module(module), f"{name}_command")
    context = click.Context(command)
    for param in command.params:
        if not isinstance(param, click.Option):
            continue
        _, text = param.get_help_record(context)
        declared = OPTIONS.get(param.name) if hasattr(param, "section") else None
        has_one = declared is not None and (declared.default or declared.without)
        if has_one or param.secondary_opts:
            assert re.search(r"\[default: [^(]", text), param.opts
        assert "default:" not in (param.help or ""), param.opts


def test_a_default_that_depends_on_something_is_told_in_words():
    text = " ".join(CliRunner().invoke(cli, ["submit", "--help"]).output.split())
    assert (
        "--top-p X Nucleus sampling: the smallest set of tokens with total probability X." in text
    )
    assert "[default: the model's, else 1]" in text
    assert "[default: 256; 512 on a GPU with 40 GiB or more; 1<=x<=1048576]" in text
    again = " ".join(CliRunner().invoke(cli, ["resume", "--help"]).output.split())
    assert "[default: as before; 1<=x<=1048576]" in again


def test_version():
    shown = CliRunner().invoke(cli, ["--version"])
    assert shown.output.startswith("batchrun 0.")
