"""Help is quick, complete, and says what the commands do."""

import importlib
import resource
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from batchrun.cli import COMMANDS, cli
from batchrun.cli.errors import ExitStatus


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


def test_version():
    shown = CliRunner().invoke(cli, ["--version"])
    assert shown.output.startswith("batchrun 0.")
