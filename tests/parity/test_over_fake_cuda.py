"""The engine over the memory of a CUDA driver, pipelined, short of memory: the same tokens."""

from __future__ import annotations

from pathlib import Path

from tests.fake_cuda import run_suite


def test_parity_over_the_fake_cuda_driver(fake_cuda: Path) -> None:
    file = Path(__file__).parent / "test_generate.py"
    options = ("-k", "llama or penalties or recorded")
    run_suite(file, "fake-cuda", fake_cuda, *options, FAKE_CUDA_GRANULARITY="4096")


def test_beams_over_the_fake_cuda_driver(fake_cuda: Path) -> None:
    file = Path(__file__).parent / "test_beams.py"
    options = ("-k", "(gemma2 and short-pipelined) or beams_that")
    run_suite(file, "fake-cuda", fake_cuda, *options, FAKE_CUDA_GRANULARITY="4096")
