"""Every test here runs on the CPU in any test run, and on a GPU with `-m gpu`: the same code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from batchrun.allocator.host import HostMemory

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    if request.param == "cuda":
        torch.cuda.synchronize()


@pytest.fixture
def memory(device: str) -> Iterator[Any]:
    if device == "cuda":
        from batchrun.allocator.cuda import (  # noqa: PLC0415 - only where there is a driver
            CudaMemory,
        )

        torch.zeros(1, device=device)
        made: Any = CudaMemory()
    else:
        made = HostMemory(64 << 10)
    yield made
    made.close()
