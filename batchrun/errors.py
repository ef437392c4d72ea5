"""What is wrong with a model or the machine, for the user to act on."""

from __future__ import annotations


class UserError(Exception):
    """Something for the user to act on, with what to type next in `hint`."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelError(UserError):
    """A model that cannot be used."""


class MachineError(UserError):
    """Something that this machine, or what it allows this process, lacks."""


class StepFailed(Exception):  # noqa: N818 - says what has happened
    """The engine failed as nobody foresaw: the rows that it had are suspects."""


# What ends the process, of all that a tokenizer may raise: its own panics are no `Exception`.
PROCESS_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_SAID = 300  # characters of an error


def said_by(error: BaseException) -> str:
    """An error's kind and its first line, in valid Unicode."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text.encode(errors="backslashreplace").decode()[:_SAID]
