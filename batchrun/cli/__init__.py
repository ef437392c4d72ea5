"""The command line. Commands are imported when they are called, so that `--help` is quick."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from batchrun import DISTRIBUTION
from batchrun.cli.errors import ExitStatus, report_errors
from batchrun.cli.mistyped import NoSuchCommand
from batchrun.terminal import guard_libraries, say

# name -> (module, what `batchrun --help` says of it)
COMMANDS = {
    "submit": ("batchrun.cli.run", "Run a model over every row of a file."),
    "plan": ("batchrun.cli.plan", "Estimate a job's tokens, memory and time before it runs."),
    "resume": ("batchrun.cli.run", "Continue a job that was stopped."),
    "stats": ("batchrun.cli.inspect", "Show where a job's rows, time and memory went."),
    "report": ("batchrun.cli.report", "Write an HTML report of a job."),
    "watch": ("batchrun.cli.run", "Watch a job until it ends."),
    "logs": ("batchrun.cli.control", "Print a job's log."),
    "cancel": ("batchrun.cli.control", "Stop a job."),
    "list": ("batchrun.cli.listing", "List all jobs."),
    "show": ("batchrun.cli.inspect", "Show one job: its inputs, parameters and runs."),
    "peek": ("batchrun.cli.peek", "Show some rows of a job beside their answers."),
    "export": ("batchrun.cli.control", "Write a job's results to a file."),
    "verify": ("batchrun.cli.control", "Check a job for damage and changes."),
    "rm": ("batchrun.cli.remove", "Remove jobs."),
    "prune": ("batchrun.cli.remove", "Remove old jobs that have ended."),
    "completion": (
        "batchrun.cli.completion",
        "Print a script that completes commands and jobs in a shell.",
    ),
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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offers commands without importing them."""
        lines = [(name, text) for name, (_, text) in COMMANDS.items()]
        found = [CompletionItem(n, help=text) for n, text in lines if n.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command, or says which ones may be meant."""
        name = args[0]
        if not (name.startswith("-") or name in COMMANDS or name in _HIDDEN):
            raise NoSuchCommand(name, COMMANDS, ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Invokes a command; an error of its parser knows the command, for the hint."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            name = ctx.invoked_subcommand
            if error.ctx is None and name and (command := self.get_command(ctx, name)):
                error.ctx = click.Context(command, info_name=name, parent=ctx)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some rows failed, "
    "130 interrupted and ready to resume.",
)
@click.version_option(package_name=DISTRIBUTION, message="batchrun %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run a whole dataset through an open LLM on your own hardware, unattended.

    Point it at a file of prompts; get the completions in the same order, beside every input column.
    Kill it at any time; `batchrun resume` continues.
    """
    if ctx.invoked_subcommand is None:
        say(*ctx.get_help().split("\n"))


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
