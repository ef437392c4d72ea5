"""Writes what the command line says of itself into docs/options.md and docs/commands.md.

    python docs/reference.py            # after a change of an option or a command
    python docs/reference.py --check    # exit with 1 if that would change a page

What stands between `<!-- generated -->` and `<!-- /generated -->` is written; the rest is prose.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from batchrun.cli import COMMANDS

HERE = Path(__file__).parent
BEGIN, END = "<!-- generated -->\n", "<!-- /generated -->"


def command(name: str) -> click.Command:
    """The command of that name."""
    found = getattr(importlib.import_module(COMMANDS[name][0]), f"{name}_command")
    assert isinstance(found, click.Command)
    return found


def options(of: click.Command) -> list[click.Option]:
    """Its options, in the order of its help."""
    return [param for param in of.params if isinstance(param, click.Option) and not param.hidden]


def submit_page() -> str:
    """The options of `submit`, section by section."""
    sections: dict[str, list[click.Option]] = {}
    for found in options(command("submit")):
        sections.setdefault(getattr(found, "section", "Options"), []).append(found)
    parts = []
    for title, members in sections.items():
        name, _, note = title.partition(" (")
        said = f"{note[0].upper()}{note[1:].removesuffix(')')}.\n\n" if note else ""
        parts.append(f"## {name}\n\n{said}{table(members)}")
    return "\n".join(parts)


def commands_page() -> str:
    """Every command but `submit`, with its help and its options."""
    shared = {found.opts[-1]: found.help for found in options(command("submit"))}
    parts = []
    for name in COMMANDS:
        if name == "submit":
            continue
        found = command(name)
        with click.Context(found, info_name=f"batchrun {name}") as context:
            usage = found.get_usage(context).removeprefix("Usage: ")
        text = _prose(inspect.cleandoc(found.help or "").replace("\b\n", ""))
        own = [o for o in options(found) if shared.get(o.opts[-1]) != o.help]
        also = [f"`{o.opts[-1]}`" for o in options(found) if o not in own]
        part = f"## {name}\n\n```\n{' '.join(usage.split())}\n```\n\n{text}\n"
        part += f"\n{table(own)}" if own else ""
        part += f"\n[Options of submit](options.md) that it takes: {', '.join(also)}.\n" * bool(
            also
        )
        parts.append(part)
    return "\n".join(parts)


def table(members: Iterable[click.Option]) -> str:
    """A Markdown table of options: two columns, which a phone has room for."""
    lines = ["| option | |", "|---|---|"]
    for found in members:
        names = ", ".join(f"`{name}`" for name in (*found.opts, *found.secondary_opts))
        about = [_prose(found.help or "")]
        words, default = values(found), found.default
        if words and not any(re.search("[a-z]", word) for word in words):  # names of values
            names += f" {' or '.join(words)}"
        elif len(words) > 1:
            about.append(f"One of {', '.join(f'`{word}`' for word in words)}.")
        elif words:
            names += f" {words[0]}"
        if isinstance(found.show_default, str):  # in words
            about.append(f"Default: {_prose(found.show_default)}.")
        elif found.show_default and not found.is_flag and isinstance(default, str | int | float):
            about.append(f"Default: `{default}`.")
        elif found.secondary_opts and found.default is True:
            about.append(f"On unless `{found.secondary_opts[0]}` is given.")
        lines.append(f"| {names} | {' '.join(about)} |")
    return "\n".join(lines) + "\n"


def values(found: click.Option) -> list[str]:
    """What may follow an option: words, or one name for its values."""
    if found.is_flag:
        return []
    if isinstance(found.type, click.Choice):
        return list(found.type.choices)
    if found.metavar:
        return found.metavar.split("|")
    return ["N" if isinstance(found.type, click.IntRange) else found.type.name.upper()]


def _prose(text: str) -> str:
    """Help as Markdown: no HTML, no end of a cell; names of options are code."""
    parts = re.split(r"(`[^`]*`)", text)
    for at in range(0, len(parts), 2):
        part = parts[at].replace("<", "&lt;").replace("|", "&#124;").replace("*", r"\*")
        parts[at] = re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", part).replace("_", r"\_")
    return "".join(parts)


PAGES = {"options.md": submit_page, "commands.md": commands_page}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name, made in PAGES.items():
        path = HERE / name
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        new = f"{before}{BEGIN}\n{made()}\n{END}{rest.partition(END)[2]}"
        if new != text:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if check else 'written'}: docs/{name}" for name in stale), end="")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
