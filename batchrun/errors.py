"""Errors that a user can act on, and how others are quoted."""

from __future__ import annotations

import pickle
import traceback

from batchrun.terminal import MESSAGE, printable


class UserError(Exception):
    """Something a user can act on.

    Args:
        message: What happened: the thing, the number, the cause.
        hint: What to type or change next. A traceback shows it as a note.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def hint(self) -> str | None:
        """What to type or change next."""
        return self._hint

    @hint.setter
    def hint(self, hint: str | None) -> None:
        before = f"hint: {getattr(self, '_hint', None)}"
        notes = [note for note in getattr(self, "__notes__", ()) if note != before]
        self._hint = hint
        self.__notes__ = [f"hint: {hint}", *notes] if hint else notes

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: where in batchrun a user's mistake was found helps nobody."""
        lines = [f"{type(self).__name__}: {self}", *self.__notes__]
        return [printable(line, MESSAGE) for line in lines]


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
    kind, first = type(error).__name__, first_line(error)
    text = first if first == kind else f"{kind}: {first}"
    return text.encode(errors="backslashreplace").decode()[:_SAID]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sendable(error: BaseException) -> BaseException:
    """The error itself if it survives being sent, else another one.

    A bug has its stack as a note; a user's error needs none.
    """
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, UserError):
        error.add_note(trace)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(trace)
    return error
