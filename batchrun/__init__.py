"""batchrun: run a whole dataset through an open LLM on your own hardware, unattended."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchrun.api import Job, list_jobs, run, submit
    from batchrun.llm import LLM

DISTRIBUTION = "batchrun-llm"  # what it is installed as
__all__ = ["LLM", "Job", "list_jobs", "run", "submit"]


class _Package(ModuleType):
    """Has its functions `run` and `submit` as attributes, not the modules of these names."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in __all__:  # or it is the import of such a module that says so
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """What stands in `__all__`, imported when it is asked for: `import batchrun` loads none."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module("batchrun.llm" if name == "LLM" else "batchrun.api"), name)


sys.modules[__name__].__class__ = _Package
