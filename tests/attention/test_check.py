"""What `batchrun doctor` says of the kernels on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from batchrun.cli.doctor import TESTED, examine
from batchrun.engine import attention
from batchrun.engine.attention import sdpa
from batchrun.engine.model.judge import KINDS, check_kernel, check_kinds
from tests.attention.test_native import HAS_COMPILER

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sdpa_is_within_rounding_of_float32(dtype: torch.dtype) -> None:
    works, what = check_kernel("sdpa", CPU, dtype)
    assert works
    assert what.endswith(f" of float32 ({str(dtype)[6:]})")


@pytest.mark.parametrize("name", sorted({*attention.NAMES} - {"sdpa", "native", "tiled"}))
def test_the_others_say_why_not(name: str) -> None:
    assert check_kernel(name, CPU, torch.float32) == (False, "it needs a CUDA device")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda out: out + 0.01, "it is wrong: off by 0.0034 from float32"),
        (lambda out: out * torch.nan, "it is wrong: off by inf from float32"),
        (lambda out: out[:, :, :7] - out, "it fails: The size of tensor"),
    ],
)
def test_a_wrong_kernel_is_found_out(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], torch.Tensor], what: str
) -> None:
    class Spoilt(sdpa.SDPA):
        name = "spoilt"

        def run(self, *arguments: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return spoil(super().run(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(sdpa, "make", lambda *_: Spoilt())
    works, found = check_kernel("sdpa", CPU, torch.float32)
    assert not works
    assert found.startswith(what)


def test_doctor_names_every_kernel() -> None:
    found = examine()["attention"]
    assert set(found) == set(attention.NAMES)
    assert found["sdpa"].startswith("works: ")
    if not torch.cuda.is_available():
        assert found["torch-flash"] == "no: it needs a CUDA device"


def test_doctor_says_which_models_have_a_kernel_here() -> None:
    found = examine()["attention_of_models"]
    assert set(found) == set(KINDS)
    named = re.findall(r"\w+", " ".join(re.findall(r"\((.*?)\)", " ".join(KINDS))))
    assert set(named) <= set(TESTED)
    if not torch.cuda.is_available() and HAS_COMPILER:
        slow = {kind for kind, what in found.items() if not what.startswith("fast: native, ")}
        assert not slow


def test_without_a_kernel_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "candidates", lambda geometry: ("torch-flash",))
    for fast, what in check_kinds(CPU, torch.float32).values():
        assert not fast
        assert re.fullmatch(r"sdpa, within \S+ of float32 \(float32\)", what)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_kind_of_attention_is_right_on_a_gpu(dtype: torch.dtype) -> None:
    for kind, spec in KINDS.items():
        works, what = check_kernel("sdpa", torch.device("cuda"), dtype, spec)
        assert works, f"{kind}: {what}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", attention.NAMES)
def test_kernels_on_a_gpu_are_right_or_say_why_not(name: str, dtype: torch.dtype) -> None:
    works, what = check_kernel(name, torch.device("cuda"), dtype)
    expected = ("flashinfer-python", "its kernels", "it needs", "it computes on a CPU")
    assert works or what.startswith(expected), what
