"""batchrun: run a whole dataset through an open LLM on your own hardware, unattended."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchrun.api import Job, list_jobs, run, submit
    from batchrun.llm import LLM

DISTRIBUTION = "batchrun-llm"  # what it is installed as
__all__ = ["LLM", "Job", "list_jobs", "run", "submit"]


def __getattr__(name: str) -> Any:
    """What stands in `__all__`, imported when it is asked for: `import batchrun` loads none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("batchrun.llm" if name == "LLM" else "batchrun.api"), name)
