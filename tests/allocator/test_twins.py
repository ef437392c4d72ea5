"""The tests of this folder again, in processes whose memory is another."""

from pathlib import Path

import pytest

from batchrun.allocator.cuda import Driver
from batchrun.allocator.vmm import AllocatorError
from tests.fake_cuda import run_suite

HERE = Path(__file__).parent
SHARED = [
    "test_vmm_contract.py",
    "test_page_pool.py",
    "test_kv_arena.py",
    "test_kv_arena_machine.py",
    "test_kv_sharing.py",
    "test_kv_fuzz.py",
    "test_kv_tensors.py",
    "test_kv_accounting.py",
]


@pytest.mark.parametrize("file", [*SHARED[:1], *SHARED[2:6]])
def test_over_host_memory_that_guards_nothing(file: str) -> None:
    run_suite(HERE / file, "unguarded-host", None, "-k", "not fault and not survive_unmapping")


@pytest.mark.parametrize("file", [*SHARED, "cuda_memory_suite.py", "cuda_costs_suite.py"])
def test_over_the_fake_cuda_driver(fake_cuda: Path, file: str) -> None:
    run_suite(HERE / file, "fake-cuda", fake_cuda, FAKE_CUDA_GRANULARITY="4096")


def test_what_a_gpu_would_run_is_rehearsed_over_the_fake_driver(fake_cuda: Path) -> None:
    """Pages of 2 MiB, and memory that is touched through the driver alone."""
    run_suite(HERE / "test_vmm_contract.py", "cuda", fake_cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("file", SHARED)
def test_over_a_gpu(file: str) -> None:
    try:
        Driver().call("cuDeviceGet", 0)
    except AllocatorError as error:
        pytest.skip(str(error))
    run_suite(HERE / file, "cuda")
