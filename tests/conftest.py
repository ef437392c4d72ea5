"""Made once for a whole test run: the embedded default model, and the fake CUDA driver."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from batchrun.models.resolve import DEFAULT_MODEL, ModelRef, resolve

if TYPE_CHECKING:
    from tests.s3 import S3

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that runs this in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it to their children
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the workers share the cores; read by torch
    _threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _threads)))
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command line sets it

# They take minutes: begun last, one of them would run alone while the other cores are idle.
_LONG = (
    "test_smollm2",
    "test_recipes",
    "test_async",
    "test_destinations",
    "test_bad_input",
    "test_check",
)
_LONG += ("test_docs", "test_recording", "test_best_of", "test_inputs_changed", "test_native_code")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else 99)


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where the converted model is kept between test runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "batchrun-tests" / "models"


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> ModelRef:
    return resolve(DEFAULT_MODEL, model_cache)


@pytest.fixture(scope="session")
def tokenizer(smollm2: ModelRef) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - not for tests that need no model

    return AutoTokenizer.from_pretrained(smollm2.path)


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
    source, library = Path(__file__).parent / "fake_cuda" / "driver.c", folder / "libcuda.so.1"
    subprocess.run([compiler, *options.split(), "-o", library, source], check=True)
    return folder


@pytest.fixture
def s3() -> Iterator[S3]:
    """A bucket of an S3 of its own."""
    from tests.s3 import running  # noqa: PLC0415 - Flask and more, for few tests

    with running() as server:
        yield server
