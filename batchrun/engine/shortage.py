"""Devices that fail or have no memory left: no fault of a model or a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchrun.engine.core import EngineError


def is_shortage(error: BaseException) -> bool:
    """Whether torch says that there is no memory; on a CPU it has no class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "CPUAllocator" in str(error)


@contextmanager
def device_errors(
    of: str = "activations", less: str | None = "--max-num-batched-tokens N or --max-num-seqs N"
) -> Iterator[None]:
    """Tell what a failing device, or one without memory, means for the job.

    Args:
        of: What the memory is for.
        less: Options of `resume` of which less takes less memory; None where only a smaller model
            does.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineError(
            f"the device failed: {str(error).splitlines()[0]}",
            hint="finished rows are safe; `batchrun resume` goes on in a new process",
        ) from error
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise EngineError(
            f"there is no memory left for {of}: {str(error).splitlines()[0]}",
            hint="free what another program has taken, then: batchrun resume"
            + (f", with a lower {less} if need be" if less else "; or use a smaller model"),
        ) from error
