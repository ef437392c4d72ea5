"""What is wrong with a model, for the user to act on."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be used, with what to type next in `hint`."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
