"""A job's options on the command line, in the sections of the help, and their types."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from batchrun.jobs.errors import OptionError
from batchrun.jobs.kinds import (
    FLAG,
    NAMED,
    NUMBER,
    TEXT,
    TEXT_OR_FILE,
    Choice,
    Integer,
    Kind,
    Option,
)
from batchrun.specs import OPTIONS

Command = TypeVar("Command", bound=Callable[..., Any])


class KindType(click.ParamType[Any]):
    """A click type that reads text as a `Kind` does.

    Args:
        kind: The kind.
    """

    def __init__(self, kind: Kind) -> None:
        self.name = kind.what
        self._kind = kind

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Converts text to a value."""
        try:
            return self._kind.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class TextOrFile(click.ParamType[Any]):
    """Text, or `@` and the path of a UTF-8 file that has it; `@@` is one @ of the text itself."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Reads the file. A newline at its end is not part of the text."""
        if not isinstance(value, str) or not value.startswith("@"):
            return value
        path = value[1:]
        if path.startswith("@"):
            return path
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        except OSError as error:
            reason = f"the file {path!r} can't be read: {error.strerror or error}"
            self.fail(f"{reason}; write @@ for a text that begins with @", param, ctx)
        except ValueError:
            self.fail(f"the file {path!r} is not UTF-8 text", param, ctx)
        return text.removesuffix("\n")


class SectionOption(click.Option):
    """An option that knows the section of the help text it belongs to."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What stands in brackets behind the help: a default in words as it is."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


section_option = partial(click.option, cls=SectionOption)


class SectionCommand(click.Command):
    """A command whose help lists its options section by section, and whose errors name flags."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it."""
        try:
            return super().invoke(ctx)
        except OptionError as error:
            message = error.spelled(lambda name: OPTIONS[name].flag)
            raise click.UsageError(message, ctx) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one list for each section, in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def job_options(*sections: str, anew: bool = False) -> Callable[[Command], Command]:
    """Gives a command the options of these sections.

    Args:
        sections: Their titles.
        anew: Only those that `resume` may change.
    """
    chosen = [
        option
        for section in sections
        for option in OPTIONS.values()
        if option.section == section and option.anew >= anew
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(chosen):
            command = _on_command_line(option, anew=anew)(command)
        return command

    return decorate


def _on_command_line(option: Option, *, anew: bool) -> Callable[[Command], Command]:
    on = option.default is True
    shown = bool(option.default) or type(option.default) is int
    named = option.kind == NAMED
    return section_option(
        *filter(None, [option.short]),
        f"{option.flag}/--no-{option.flag[2:]}" if on else option.flag,
        option.name,
        section=option.section,
        type=_type(option.kind),
        is_flag=option.kind == FLAG,
        multiple=option.several or named,
        callback=_pairs if named else None,
        default=option.default if shown else None,
        show_default="as before" if anew else option.without or shown,
        metavar=option.metavar,
        help=option.help,
    )


def _type(kind: Kind | Integer | Choice) -> click.ParamType[Any]:
    if isinstance(kind, Choice):
        return click.Choice(list(kind.words))
    if isinstance(kind, Integer):
        return click.INT if kind == Integer() else click.IntRange(kind.least, kind.most)
    plain: dict[Kind, click.ParamType[Any]] = {FLAG: click.BOOL, NUMBER: click.FLOAT}
    plain |= {TEXT: click.STRING, NAMED: click.STRING, TEXT_OR_FILE: TextOrFile()}
    return plain.get(kind) or KindType(kind)


def _pairs(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    """The values of repeated `NAME=VALUE`s: JSON if valid, else text."""
    found: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"{param.opts[0]} {pair}: write NAME=VALUE", ctx)
        if name in found:
            raise click.UsageError(f"{param.opts[0]} {name} is given twice", ctx)
        try:
            found[name] = json.loads(text)
            json.dumps(found[name], allow_nan=False)
        except (ValueError, RecursionError):
            found[name] = text
    return found
