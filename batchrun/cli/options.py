"""A job's options on the command line, in the sections of the help, and their types.

Options that the command line leaves out come from variables and files: `batchrun.cli.settings`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from batchrun.cli.jobnames import files
from batchrun.cli.settings import (
    SettingsError,
    keys_of,
    settings,
    several,
    unknown_variables,
    variable_of,
)
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
from batchrun.options import OPTIONS
from batchrun.terminal import tell

_SOURCES = "batchrun.sources"  # of the values that files set, in a context's `meta`
_PARAMS = {"json": "as_json"}  # names that Python has for something else
_PATHS = ("model", "draft_model", "output")  # options whose values may be paths
ARGUMENTS = "batchrun.arguments"  # key in `click.Context.meta`
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
    """An option that knows the section of the help text it belongs to, and its variable."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        self.keys = {self.opts[-1].lstrip("-").replace("-", "_")}
        if self.name in OPTIONS:
            self.keys |= keys_of(self.name)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        """The text of its variable, or texts if it can be repeated."""
        variable = self._variable(ctx)
        if variable is None:
            return None
        text = os.environ[variable]
        return several(text, OPTIONS.get(self.name or "")) if self.multiple else text

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Converts a value; that of a file is converted already."""
        if ctx.get_parameter_source(self.name or "") is ParameterSource.DEFAULT_MAP:
            return value
        return super().process_value(ctx, value)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Its name, and the variable that has the value."""
        hint = super().get_error_hint(ctx)
        return hint if ctx is None else hint + _from(ctx, self)

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What stands in brackets behind the help: a default in words as it is."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra

    def source(self, ctx: click.Context) -> str | None:
        """Where its value comes from: None for the command line and the default."""
        found = ctx.get_parameter_source(self.name or "")
        if found is ParameterSource.ENVIRONMENT:
            return self._variable(ctx)
        if found is ParameterSource.DEFAULT_MAP:
            return str(ctx.meta[_SOURCES][self.name])
        return None

    def _variable(self, ctx: click.Context) -> str | None:
        configured = getattr(ctx.command, "configured", ())
        return variable_of(self.keys) if configured is None or self.name in configured else None


def sources(ctx: click.Context) -> dict[str, str]:
    """Where each option's value comes from, by its name in Python.

    That is `command line`, `default`, a variable's name, or a file's path and the key in it.
    """
    found = {}
    for param in ctx.command.params:
        if isinstance(param, SectionOption) and param.name is not None:
            given = ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
            found[param.name] = param.source(ctx) or ("command line" if given else "default")
    return found


def _from(ctx: click.Context, param: SectionOption) -> str:
    source = param.source(ctx)
    return f" (from {source})" if source else ""


section_option = partial(click.option, cls=SectionOption)


class SectionCommand(click.Command):
    """A command whose help lists its options section by section, and whose errors name flags.

    Args:
        configured: Options that variables may set, and files if these are all, which None means.
    """

    def __init__(self, *args: Any, configured: Collection[str] | None = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configured = configured

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses them, over what variables and files say; keeps them as typed in `ctx.meta`."""
        ctx.meta[ARGUMENTS] = (ctx.info_name, *args)
        if self.configured is not None or ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        given, _, params = self.make_parser(ctx).parse_args([*args])
        if any(param.is_eager for param in params):  # --help, whatever the files say
            return super().parse_args(ctx, args)
        inputs = given["inputs"] if isinstance(given["inputs"], tuple) else ()
        try:
            found = settings(inputs)
        except SettingsError as error:
            error.ctx = ctx
            raise
        ctx.default_map = {_PARAMS.get(n, n): setting.value for n, setting in found.values.items()}
        ctx.meta[_SOURCES] = {_PARAMS.get(n, n): s.source for n, s in found.values.items()}
        rest = super().parse_args(ctx, args)
        if inputs and not found.inputs and any(param.required for param in self.params):
            raise SettingsError(
                f"{inputs[0]} names no inputs",
                hint='add a line such as: inputs = ["rows.parquet"]',
            )
        ctx.params["inputs"] = found.inputs
        tell(*found.notes, *unknown_variables())
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it."""
        try:
            return super().invoke(ctx)
        except OptionError as error:
            params = {p.name: p for p in self.params if isinstance(p, SectionOption)}

            def spell(name: str) -> str:
                param = params.get(name)
                return OPTIONS[name].flag + (_from(ctx, param) if param is not None else "")

            raise click.UsageError(error.spelled(spell), ctx) from error

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
        shell_complete=files if option.name in _PATHS else None,
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
