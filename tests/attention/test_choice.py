"""Which backend serves a model, and why others don't."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from batchrun.engine import attention
from batchrun.engine.attention import (
    Geometry,
    LayerSpec,
    sdpa,
    torch_flash,
    triton_attention,
)
from tests.attention.slots import upload

LAYER = LayerSpec(4, 2, 64, 64, 0.125)
CPU = Geometry((LAYER,), 64, 2, 2, 16, torch.bfloat16, torch.device("cpu"))
CUDA = replace(CPU, device=torch.device("cuda"))
KERNELS = [name for name in attention.NAMES if name not in {"sdpa", "native", "triton", "tiled"}]
DETERMINISTIC = replace(CUDA, deterministic=True)


def with_layer(**changes: object) -> Geometry:
    return replace(CUDA, layers=(LAYER, replace(LAYER, **changes)))  # type: ignore[arg-type]


def test_sdpa_serves_everything() -> None:
    assert (
        attention.unsupported_reason("sdpa", with_layer(sinks=True, softcap=3.0, v_dim=48)) is None
    )
    assert attention.create("sdpa", with_layer(sinks=True, v_dim=48)).name == "sdpa"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        (CPU, "CUDA device"),
        (replace(CUDA, dtype=torch.float32), "not in float32"),
        (with_layer(v_dim=32), "keys of 64 and values of 32"),
        (with_layer(k_dim=264, v_dim=264), "keys of 264"),
        (with_layer(k_dim=60, v_dim=60), "keys of 60"),
        (with_layer(sinks=True), "attention sinks"),
    ],
)
def test_a_kernel_says_why_it_cannot(name: str, geometry: Geometry, reason: str) -> None:
    found = attention.unsupported_reason(name, geometry)
    assert found is not None
    assert reason in found
    with pytest.raises(ValueError, match=f"{name} can't be used: .*{reason}"):
        attention.create(name, geometry, upload)


def test_torch_flash_knows_its_own_bounds() -> None:
    capped = attention.unsupported_reason("torch-flash", with_layer(softcap=30.0))
    assert capped == "it has no soft cap on scores"
    wide = replace(CUDA, slot_tokens=1 << 20, num_slots=2048)
    assert attention.unsupported_reason("torch-flash", wide) == (
        "its 32-bit indices can't cover the address space of all slots"
    )


@pytest.mark.skipif(find_spec("flashinfer") is not None, reason="flashinfer is installed")
def test_a_missing_wheel_is_a_reason() -> None:
    found = attention.unsupported_reason("flashinfer-fa2", CUDA)
    assert found == "flashinfer-python can't be imported: No module named 'flashinfer'"


def test_auto_is_sdpa_for_float32_on_a_gpu_and_says_nothing() -> None:
    lines: list[str] = []
    geometry = replace(CUDA, dtype=torch.float32)
    assert attention.create("auto", geometry, upload, lines.append).name == "sdpa"
    assert lines == []


def test_auto_says_in_one_line_what_it_could_not_use() -> None:
    lines: list[str] = []
    made = attention.create("auto", with_layer(sinks=True), upload, lines.append)
    assert made.name == "sdpa"
    assert len(lines) == 1
    assert lines[0].startswith("using sdpa attention (flashinfer-fa3: ")
    assert all(name in lines[0] for name in KERNELS)


@pytest.fixture
def supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which every backend works, as far as its arrays."""
    for module in (sdpa, torch_flash, triton_attention):
        monkeypatch.setattr(module, "unsupported_reason", lambda *_, **__: None)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # there is no device


@pytest.mark.usefixtures("supported")
def test_deterministic_steps_have_an_invariant_backend() -> None:
    lines: list[str] = []
    for name in ("auto", "triton"):
        made = attention.create(name, DETERMINISTIC, upload, lines.append)
        assert (made.name, made.invariant) == ("triton", True)
    assert lines == []
    for name in ("sdpa", "torch-flash"):
        with pytest.raises(ValueError, match="depends on the batch; with --deterministic use trit"):
            attention.create(name, DETERMINISTIC, upload)
        with pytest.raises(ValueError, match="depends on the batch"):
            attention.check(name, DETERMINISTIC)
        assert not attention.create(name, CUDA, upload).invariant
    assert attention.create("sdpa", replace(CPU, deterministic=True)).name == "sdpa"


def test_deterministic_steps_never_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"guaranteed \(triton: triton is not installed"):
        attention.create("auto", DETERMINISTIC, upload)


def test_triton_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.unsupported_reason("triton", CPU) == "it needs a CUDA device"
    monkeypatch.setattr(triton_attention, "find_spec", lambda _: SimpleNamespace())
    double = replace(CUDA, dtype=torch.float64)
    assert attention.unsupported_reason("triton", double) == "it does not compute in float64"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = attention.unsupported_reason("triton", CUDA)
    assert found == "it needs compute capability 8.0 or higher, and this device has 7.5"


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'fast'; use auto or one of sdpa, native, torch-flash"):
        attention.create("fast", CUDA)


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys, batchrun.engine.attention as a; assert a.NAMES and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
