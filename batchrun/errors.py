"""Errors that a user can act on, and how others are quoted."""

from __future__ import annotations


class UserError(Exception):
    """Something a user can act on.

    Args:
        message: What happened: the thing, the number, the cause.
        hint: What to type or change next.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ModelError(UserError):
    """A model that cannot be used."""


class MachineError(UserError):
    """Something is missing on this machine, or not allowed to this process."""


class StepFailed(Exception):  # noqa: N818 - says what has happened
    """The engine failed in an unforeseen way; the rows in it are suspects."""


# Let these through where a tokenizer may raise anything: its panics aren't `Exception`s either.
PROCESS_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_SAID = 300  # characters of an error


def said_by(error: BaseException) -> str:
    """An error's type and first line, in valid Unicode."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text.encode(errors="backslashreplace").decode()[:_SAID]
