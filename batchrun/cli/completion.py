"""`batchrun completion`: what a shell runs to complete commands, options and job ids."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from batchrun.cli.errors import ExitStatus
from batchrun.terminal import say

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_BATCHRUN_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> int:
    """Print a script that completes commands and jobs in a shell.

    bash, in ~/.bashrc: eval "$(batchrun completion bash)"

    zsh, in ~/.zshrc: eval "$(batchrun completion zsh)"

    fish: batchrun completion fish > ~/.config/fish/completions/batchrun.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "batchrun", VARIABLE).source()
    # Where there is nothing of ours to offer, such as for the path of a file, bash offers its own.
    say(*script.replace("complete -o nosort", "complete -o nosort -o default").split("\n"))
    return ExitStatus.DONE
