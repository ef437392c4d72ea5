"""The command line. Commands are imported when they are called, so that `--help` is quick."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

import click

from batchrun import DISTRIBUTION
from batchrun.cli.errors import ExitStatus, report_errors
from batchrun.terminal import guard_libraries

# name -> (module, what `batchrun --help` says of it)
COMMANDS = {
    "submit": ("batchrun.cli.run", "Run a model over every row of a file."),
    "plan": ("batchrun.cli.plan", "Say what a job would take, before any weight is loaded."),
    "resume": ("batchrun.cli.run", "Continue a job that was stopped."),
    "stats": ("batchrun.cli.inspect", "Show where a job's rows, time and memory went."),
    "report": ("batchrun.cli.report", "Write a page about a job."),
    "watch": ("batchrun.cli.run", "Watch a job until it ends."),
    "logs": ("batchrun.cli.control", "Print a job's log."),
    "cancel": ("batchrun.cli.control", "Stop a job."),
    "list": ("batchrun.cli.inspect", "List all jobs."),
    "show": ("batchrun.cli.inspect", "Show one job: its inputs, parameters and runs."),
    "export": ("batchrun.cli.control", "Write a job's results to a file."),
    "verify": ("batchrun.cli.control", "Check a job."),
    "rm": ("batchrun.cli.control", "Remove jobs."),
    "config": ("batchrun.cli.config", "Show the options in force, and where each comes from."),
    "doctor": ("batchrun.cli.doctor", "Show what this machine can do."),
}
_HIDDEN = dict.fromkeys(("work", "run-job", "run-worker"), "batchrun.cli.work")


class LazyGroup(click.Group):
    """A group that knows its commands' names and help, and imports a command only to call it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order in which a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command."""
        module = COMMANDS[cmd_name][0] if cmd_name in COMMANDS else _HIDDEN.get(cmd_name)
        if module is None:
            return None
        name = cmd_name.replace("-", "_")
        found = getattr(importlib.import_module(module), f"{name}_command")
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some rows failed, "
    "130 interrupted and ready to resume.",
)
@click.version_option(package_name=DISTRIBUTION, message="batchrun %(version)s")
def cli() -> None:
    """Run a whole dataset through an open LLM on your own hardware, unattended.

    Point it at a file of prompts; get the completions in the same order, beside every input column.
    Kill it at any time; `batchrun resume` continues.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: runs a command and exits with its status."""
    guard_libraries()
    try:
        status = report_errors(
            lambda: cli.main(arguments, prog_name="batchrun", standalone_mode=False)
        )
    except KeyboardInterrupt:  # a second one, while the first was handled
        status = ExitStatus.INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all that is left is to exit
    sys.exit(status)
