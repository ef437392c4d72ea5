"""What is right of each kind of file: every module here has `TARGETS`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tests.fuzz.trial import Target


def all_targets() -> dict[str, Target]:
    """All targets by name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    return {target.name: target for module in modules for target in module.TARGETS}
