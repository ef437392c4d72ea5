"""What sets options beside the command line: variables, and TOML files.

    command line > BATCHRUN_* > job file > batchrun.toml of the project > of the user > default

A project's file lies in this folder or above it, and may have come with somebody's data. It can't
set what runs code, writes or replaces files, or connects to other machines.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import click

from batchrun import platforms
from batchrun.jobs.errors import OptionError
from batchrun.jobs.kinds import NAMED, Option
from batchrun.objectstore.paths import URL
from batchrun.options import OPTIONS, PIPE

FILE = "batchrun.toml"
INPUTS = "inputs"  # a key of job files
SUFFIX = ".toml"  # of a job file
PREFIX = "BATCHRUN_"
SWITCHES = ("wait", "again", "dry_run", "json")  # of `submit`, beside the options of a job
# What batchrun means by other variables.
OTHERS = {
    *("HOME", "STALL_SECONDS", "PROMPT_SECONDS", "HOOK_SECONDS", "INHERITED"),
    *("JOB", "STATE", "ROWS_DONE", "ROWS_FAILED"),  # told to the command of --on-done
}
# What a project's file can't set.
NOT_A_PROJECTS = {
    "trust_remote_code": "it runs a model's code",
    "on_done": "it runs a command",
    "ray": "it connects to other machines",
    "output": "it chooses which file is written",
    "overwrite": "it lets files be replaced",
    "special_tokens_in_data": "it lets data pass for control tokens",
}
_READ = ("json_schema", "grammar")  # a text, or a file with it
_MODELS = ("model", "draft_model")
_MOST = 256 << 10  # bytes of a file
_DOTS = 500  # in a line: tomllib takes minutes for a key of 100,000 parts
_ROOTS = (".git", ".hg")  # a project's file is not looked for above these


class SettingsError(click.UsageError):
    """A file sets something that can't be, or can't be read.

    Args:
        message: What is wrong, and where.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class _Theirs(Exception):  # noqa: N818 - a state of the file
    """Somebody else could have written a file that nobody named."""


class Setting(NamedTuple):
    """A value, and where it comes from, such as `/data/job.toml: max-tokens`."""

    value: Any
    source: str


@dataclass(frozen=True)
class Settings:
    """What files say.

    Args:
        values: By option name, of which `json` and others are no job's.
        inputs: Those to read.
        notes: What to tell the user.
    """

    values: Mapping[str, Setting] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def keys_of(name: str) -> set[str]:
    """The names of an option in files, with underscores: that in Python, and the flag's."""
    return {name, OPTIONS[name].flag[2:].replace("-", "_")} if name in OPTIONS else {name}


_NAMES = {key: name for name in (*OPTIONS, *SWITCHES) for key in keys_of(name)}


def settings(given: Sequence[str], folder: Path | None = None) -> Settings:
    """What files set: a job file among the inputs, the project's and the user's.

    Args:
        given: The inputs as the user typed them.
        folder: Where; by default the working folder.

    Raises:
        SettingsError: A file can't be read, or sets what can't be set.
    """
    files = [name for name in given if name.lower().endswith(SUFFIX)]
    if len(files) > 1:
        raise SettingsError(f"{files[0]} and {files[1]}: a job has one job file")
    values, notes, inputs = dict[str, Setting](), [], tuple(given)
    if (path := _users()) is not None and os.path.lexists(path):
        values |= _read(path)[0]
        if f"{PREFIX}JOB" in os.environ:  # set by a command of --on-done, which would never end
            values.pop("on_done", None)
    if (path := _projects(folder)) is not None:
        try:
            own, _ = _read(path, project=True)
            values |= own
            said = ", ".join(sorted(_key(setting.source) for setting in own.values()))
            notes.append(f"{path} sets {said or 'nothing'}")
        except _Theirs:
            notes.append(f"{path} is ignored: another user could have written it")
    if files:
        own, named = _read(Path(files[0]).absolute(), job=True)
        values |= own
        inputs = tuple(name for name in given if name != files[0]) or named
    return Settings(values, inputs, tuple(notes))


def _users() -> Path | None:
    """The user's file, which need not be there."""
    place = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(place):  # as its specification says
        place = os.path.expanduser("~/.config")
    return Path(place, "batchrun", FILE) if os.path.isabs(place) else None


def _projects(folder: Path | None) -> Path | None:
    """The project's file: the nearest one, up to the home folder or a repository's root."""
    try:
        here, home = folder or Path.cwd(), os.path.expanduser("~")
    except FileNotFoundError:  # the working folder was removed
        return None
    for place in (here, *here.parents):
        if os.path.lexists(place / FILE):
            return place / FILE
        if str(place) == home or any(os.path.exists(place / root) for root in _ROOTS):
            return None
    return None


def _read(
    path: Path, *, job: bool = False, project: bool = False
) -> tuple[dict[str, Setting], tuple[str, ...]]:
    """A file's settings, and the inputs that a job file names."""
    data = _parsed(path, ours=project)
    inputs: tuple[str, ...] = ()
    if job and INPUTS in data:
        inputs = _inputs(path, data.pop(INPUTS))
    found = dict[str, Setting]()
    for key, value in data.items():
        name, source = _name(path, key), f"{path}: {key}"
        if name in found:
            raise SettingsError(f"{source} is given twice, also as {_key(found[name].source)}")
        if project:
            _check_project(source, name, value)
        found[name] = Setting(_value(source, name, value, path.parent), source)
    return found, inputs


def _parsed(path: Path, *, ours: bool) -> dict[str, Any]:
    """A file's content; raises `_Theirs` if it must be this user's and is not."""
    try:
        # A pipe in the place of a file must not hold the command up.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | platforms.OPEN_FLAGS
        handle = os.open(path, flags)
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{path} is not a regular file")
            if ours and not platforms.WINDOWS and _is_others(status):
                raise _Theirs
            text = file.read(_MOST + 1)
        if len(text) > _MOST:
            raise SettingsError(
                f"{path} is larger than {_MOST >> 10} KiB, which is too large for a file of options"
            )
        if any(line.count(b".") > _DOTS for line in text.split(b"\n")):
            raise SettingsError(
                f"{path} has a line with more than {_DOTS:,} dots, which is too many to read"
            )
        return tomllib.loads(text.decode("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text, at byte {error.start}") from error
    except RecursionError as error:
        raise SettingsError(f"{path} is not TOML: it is nested too deeply") from error
    except ValueError as error:
        raise SettingsError(f"{path} is not TOML: {error}", hint="https://toml.io") from error


def _is_others(status: os.stat_result) -> bool:
    """Whether another user, but root, could have written a file."""
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & stat.S_IWOTH)


def _name(path: Path, key: str) -> str:
    """The option that a key names."""
    plain = key.replace("-", "_")
    if plain in _NAMES:
        return _NAMES[plain]
    if plain == INPUTS:
        raise SettingsError(
            f"{path}: {key}: only a job file has inputs", hint="batchrun submit job.toml"
        )
    near = get_close_matches(plain, (*_NAMES, INPUTS), 1)
    meant = f"; did you mean `{near[0].replace('_', '-')}`?" if near else ""
    raise SettingsError(
        f"{path}: there is no option `{key}`{meant}", hint="batchrun submit --help lists them"
    )


def _key(source: str) -> str:
    return source.rpartition(": ")[2]


def _check_project(source: str, name: str, value: object) -> None:
    """Refuse what the file of a folder can't set."""
    reason = NOT_A_PROJECTS.get(name)
    if reason is None and name in _MODELS and isinstance(value, str) and URL.fullmatch(value):
        reason = "a URL connects to other machines"
    if reason is not None:
        raise SettingsError(
            f"{source} can't be set by a file that is found in a folder: {reason}",
            hint=f"set it on the command line, with {PREFIX}{name.upper()}, in a job file, or in "
            f"{_users() or 'the user file'}",
        )


def _value(source: str, name: str, value: Any, folder: Path) -> Any:
    """A value of an option, converted."""
    if any("\0" in text for text in _texts(value)):
        raise SettingsError(f"{source}: it contains a null character")
    if name in SWITCHES:
        if not isinstance(value, bool):
            raise SettingsError(f"{source}: {value!r} is neither true nor false")
        return value
    option = OPTIONS[name]
    try:
        placed = _placed(name, value, folder)
        if name in _READ and isinstance(placed, str) and _is_odd(placed):
            raise SettingsError(f"{source}: {placed} is not a regular file")
        return option.read(placed)
    except OptionError as error:
        raise SettingsError(error.spelled(lambda _: source)) from None


def _is_odd(path: str) -> bool:
    """Whether reading it could take forever."""
    return os.path.exists(path) and not os.path.isfile(path)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _placed(name: str, value: Any, folder: Path) -> Any:
    """A value whose path is that of a file's folder, if it is relative."""
    if not isinstance(value, str) or not value or URL.fullmatch(value):
        return value
    path = str(folder / os.path.expanduser(value))
    if name == "output":
        return value if value == PIPE else path
    if name in _MODELS:
        named = value.startswith((".", "~", "/")) or os.path.exists(path)
        return path if named else value  # an alias, or a hub id
    if name == "json_schema":
        return value if value.lstrip().startswith("{") else path
    if name == "grammar":
        return value if "\n" in value or "start:" in value else path
    return value


def _inputs(path: Path, value: object) -> tuple[str, ...]:
    """The inputs that a job file names."""
    names = [value] if isinstance(value, str) else value
    source = f"{path}: {INPUTS}"
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise SettingsError(f'{source}: write a list of paths, such as ["rows.parquet"]')
    if any("\0" in name for name in names):
        raise SettingsError(f"{source}: it contains a null character")
    if any(name.lower().endswith(SUFFIX) for name in names):
        raise SettingsError(f"{source}: a job file cannot be an input of another one")
    return tuple(_beside(path.parent, name) for name in names)


def _beside(folder: Path, name: str) -> str:
    """An input that is named from a folder; wildcards in the folder's own name are none."""
    name = os.path.expanduser(name)
    if name == PIPE or URL.fullmatch(name) or os.path.isabs(name):
        return name
    plain = folder / name
    return str(plain) if os.path.lexists(plain) else os.path.join(escape(str(folder)), name)


def variable_of(names: Collection[str]) -> str | None:
    """The variable that is set for an option of these names; an empty one is not."""
    for name in sorted(names):
        variable = f"{PREFIX}{name.upper()}"
        if name == "output" and f"{PREFIX}JOB" in os.environ:
            continue  # in a command of --on-done it is the job's output
        if os.environ.get(variable):
            return variable
    return None


def several(text: str, option: Option | None) -> list[str]:
    """The values of an option that can be repeated: a JSON array's, a JSON object's, or one."""
    try:
        found = json.loads(text) if text.lstrip()[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and option is not None and option.kind == NAMED:
        return [f"{name}={json.dumps(value)}" for name, value in found.items()]
    if isinstance(found, list):
        return [item if isinstance(item, str) else json.dumps(item) for item in found]
    return [text]


def unknown_variables() -> Iterator[str]:
    """A line for each variable that looks like a misspelled one. Others may be anybody's."""
    known = {*(key.upper() for key in _NAMES), *OTHERS}
    for variable in sorted(os.environ):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in known:
            continue
        if near := get_close_matches(name, known, 1, 0.8):
            yield f"{variable} is not a known variable; did you mean {PREFIX}{near[0]}?"
