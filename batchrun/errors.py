"""What is wrong with a model, for the user to act on."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be used, with what to type next in `hint`."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


# What ends the process, of all that a tokenizer may raise: its own panics are no `Exception`.
PROCESS_ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_SAID = 300  # characters of an error


def said_by(error: BaseException) -> str:
    """An error's kind and its first line, in valid Unicode."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text.encode(errors="backslashreplace").decode()[:_SAID]
