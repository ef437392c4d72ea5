"""What a user may have meant by a command or an option that there isn't."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

import click

# What commands of other programs, and of clusters, are called; and the command here.
_SYNONYMS = {
    "status": ("list", "watch"),
    "ps": ("list",),
    "jobs": ("list",),
    "ls": ("list",),
    "queue": ("list",),
    "run": ("submit",),
    "start": ("submit",),
    "generate": ("submit",),
    "infer": ("submit",),
    "create": ("submit",),
    "new": ("submit",),
    "continue": ("resume",),
    "restart": ("resume",),
    "retry": ("resume",),
    "attach": ("watch",),
    "follow": ("watch",),
    "stop": ("cancel",),
    "kill": ("cancel",),
    "abort": ("cancel",),
    "delete": ("rm",),
    "remove": ("rm",),
    "clean": ("prune",),
    "purge": ("prune",),
    "head": ("peek",),
    "sample": ("peek",),
    "html": ("report",),
    "log": ("logs",),
    "tail": ("logs",),
    "info": ("show", "stats"),
    "describe": ("show",),
    "inspect": ("show",),
    "metrics": ("stats",),
    "summary": ("stats",),
    "estimate": ("plan",),
    "output": ("export",),
    "results": ("export",),
    "save": ("export",),
    "check": ("verify", "doctor"),
    "validate": ("verify",),
    "env": ("doctor",),
    "help": ("--help",),
    "version": ("--version",),
}


class NoSuchCommand(click.UsageError):
    """A command that does not exist.

    Args:
        name: What was typed.
        commands: Those that there are.
        ctx: Where it was typed.
    """

    def __init__(self, name: str, commands: Collection[str], ctx: click.Context) -> None:
        super().__init__(f"there is no command {name!r}", ctx)
        near = [c for c in _SYNONYMS.get(name.lower(), ()) if c in commands or c[0] == "-"]
        near = near or get_close_matches(name.lower(), [*commands, *_SYNONYMS], 1, 0.7)
        found = [c for word in near for c in (_SYNONYMS.get(word, (word,)))]
        tried = " or ".join(f"batchrun {command}" for command in found)
        self.hint = f"did you mean {tried}?" if found else "batchrun --help lists the commands"


def meant(error: click.NoSuchOption) -> str | None:
    """The hint for an option that does not exist; None if none is like it."""
    typed = "--" + error.option_name.lstrip("-").replace("_", "-").lower()
    names = (
        {o for p in error.ctx.command.params for o in (*p.opts, *p.secondary_opts)}
        if error.ctx
        else set()
    )
    known = sorted(name for name in names if name.startswith("--"))
    near = get_close_matches(typed, known, 1, 0.75)
    starting = [name for name in known if name.startswith(typed)]
    found = near if typed in known else starting if len(starting) == 1 else near
    return f"did you mean {found[0]}?" if found else None
