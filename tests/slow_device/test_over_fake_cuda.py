"""The engine over a slow device whose memory is a CUDA driver's."""

from __future__ import annotations

from pathlib import Path

from tests.fake_cuda import run_suite

HERE = Path(__file__).parent
SMALL = {"FAKE_CUDA_GRANULARITY": "4096"}


def test_what_an_engine_asks_of_the_driver(fake_cuda: Path) -> None:
    file = HERE / "driver_suite.py"
    run_suite(file, "fake-cuda", fake_cuda, "-k", "not addresses", **SMALL)
    few = str(4 << 20)
    run_suite(file, "fake-cuda", fake_cuda, "-k", "addresses", FAKE_CUDA_ADDRESSES=few, **SMALL)


def test_the_engine_over_the_fake_driver(fake_cuda: Path) -> None:
    run_suite(HERE / "test_engine.py", "fake-cuda", fake_cuda, **SMALL)
