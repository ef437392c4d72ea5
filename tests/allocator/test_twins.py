"""The tests of this folder again, in processes whose memory is a CUDA device's, or a fake one's."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from memory_twins import ROOT

from allocator.cuda import Driver
from allocator.vmm import AllocatorError

HERE = Path(__file__).parent
SHARED = [
    "test_vmm_contract.py",
    "test_page_pool.py",
    "test_kv_arena.py",
    "test_kv_arena_machine.py",
    "test_kv_tensors.py",
    "test_kv_accounting.py",
]


def run_suite(file: Path, twin: str, library: Path | None = None, **environment: str) -> None:
    path = os.environ.get("LD_LIBRARY_PATH", "")
    path = f"{library}:{path}".rstrip(":") if library else path
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=ROOT,
        env={**os.environ, "BATCHRUN_TEST_MEMORY": twin, "LD_LIBRARY_PATH": path, **environment},
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fake driver as libcuda.so.1."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) to build the fake CUDA driver with")
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")
    folder = tmp_path_factory.mktemp("fake_cuda")
    options = "-std=c11 -Wall -Wextra -Werror -O1 -shared -fPIC -fvisibility=hidden -pthread"
    source, library = ROOT / "tests/fake_cuda/driver.c", folder / "libcuda.so.1"
    subprocess.run([compiler, *options.split(), "-o", library, source], check=True)
    return folder


@pytest.mark.parametrize("file", [*SHARED, "cuda_memory_suite.py"])
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
