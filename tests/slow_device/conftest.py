"""Tiny models gain nothing from threads."""

from tests.parity.conftest import _one_thread

__all__ = ["_one_thread"]
