"""Devices that fail or run out of memory, which is no fault of the model or a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchrun.engine.core import EngineError
from batchrun.errors import first_line


def is_shortage(error: BaseException) -> bool:
    """Whether torch ran out of memory; on a CPU it has no exception class for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "CPUAllocator" in str(error)


@contextmanager
def device_errors(
    of: str = "activations", less: str | None = "--max-num-batched-tokens N or --max-num-seqs N"
) -> Iterator[None]:
    """Turn a device failure or a lack of memory into an `EngineError`.

    Args:
        of: What the memory is for.
        less: Options of `resume` that need less memory when lowered; None if only a smaller model
            helps.
    """
    try:
        yield
    except torch.AcceleratorError as error:
        raise EngineError(
            f"the device failed: {first_line(error)}",
            hint="finished rows are safe; `batchrun resume` continues in a new process",
        ) from error
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise EngineError(
            f"there is no memory left for {of}: {first_line(error)}",
            hint="free memory that other programs use, then: batchrun resume"
            + (f", with a lower {less} if needed" if less else "; or use a smaller model"),
        ) from error
