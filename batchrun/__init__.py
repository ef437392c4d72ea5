"""batchrun: run a whole dataset through an open LLM on your own hardware, unattended."""

# With `python -m batchrun` this is executed before `__main__` takes the working folder off the
# path: a module that is imported here could be a file of that folder.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from batchrun.api import Job, list_jobs, run, submit
    from batchrun.llm import LLM

DISTRIBUTION = "batchrun-llm"  # what it is installed as
__all__ = ["LLM", "Job", "list_jobs", "run", "submit"]


def __getattr__(name: str) -> object:
    """Import the names in `__all__` on first use: `import batchrun` alone loads none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    return getattr(import_module("batchrun.llm" if name == "LLM" else "batchrun.api"), name)
