"""`CudaTransfers` over the slow device; and each of its waits left out, which must be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.slow_device.device import SlowDevice, TooEarlyError
from tests.slow_device.rig import Transfers

LAG = 1
SIZES = [3, 100, 0, 0, 5, 600, 2, 900, 0, 0, 0, 1, 4]  # 600 and more do not fit the staging memory
Fault = Callable[[Transfers, Any], None]


def run(
    device: SlowDevice,
    *,
    lag: int = LAG,
    collects: bool = True,
    fault: Fault = lambda transfers, download: None,
) -> None:
    """Steps that send numbers up and get others back, so many each; 0 gets nothing back."""
    transfers = Transfers(device, lag, 1 << 12)
    flying: list[tuple[Any, list[int]]] = []
    for number, count in enumerate([*SIZES, *[1] * lag]):
        array = np.arange(max(1, count)) + 1000 * number
        wanted = [*(array + 1), *(array + 51)] if count else []
        fault(transfers, None)
        with transfers.step():
            sent = transfers.upload(array), transfers.upload(array + 50)
            array[:] = -1  # free at once
            transfers.started()
            sums = torch.cat(sent) + 1
            download = transfers.download(*[sums] * bool(count))
            fault(transfers, download)
            del sums, sent
        flying.append((download, wanted))
        while collects and len(flying) > lag:
            download, wanted = flying.pop(0)
            assert download.get() == [wanted] * bool(wanted)
    transfers.drain()


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("early", [0.0, 0.3])
def test_numbers_arrive_as_they_were_sent(early: float, lag: int, collects: bool) -> None:
    for seed in range(10 if early else 1):
        with SlowDevice(early, seed).installed() as device:
            run(device, lag=lag, collects=collects)


def test_busy_until_waited_for() -> None:
    with SlowDevice().installed() as device:
        transfers = Transfers(device, LAG, 1 << 12)
        assert not transfers.busy()
        with transfers.step():
            sent = transfers.upload(np.arange(4))
            transfers.started()
            download = transfers.download(sent)
        assert transfers.busy()
        assert download.get() == [[0, 1, 2, 3]]
        assert not transfers.busy()
        assert transfers.device_seconds > 0


def nothing(*_: object) -> None:
    pass


def ends_unawaited(transfers: Transfers, download: Any) -> None:
    for stage in transfers._stages:
        stage.end.synchronize = nothing


def arrivals_unawaited(transfers: Transfers, download: Any) -> None:
    for stage in transfers._stages:
        stage.arrived.synchronize = nothing


def uploads_unordered(transfers: Transfers, download: Any) -> None:
    transfers.compute.wait_event = nothing


def large_uploads_unordered(transfers: Transfers, download: Any) -> None:
    transfers.compute.wait_stream = nothing


def uploads_to_memory_in_use(transfers: Transfers, download: Any) -> None:
    transfers._up.wait_stream = nothing


def downloads_unordered(transfers: Transfers, download: Any) -> None:
    transfers._down.wait_event = nothing


def sources_let_go(transfers: Transfers, download: Any) -> None:
    if download is not None:
        download.sources = ()


FOUND = {
    ends_unawaited: (torch.AcceleratorError, "not ready"),
    arrivals_unawaited: (AssertionError, str(torch.iinfo(torch.int64).max)),
    # Garbage, and one more: of bytes -1, of whole numbers the largest.
    uploads_unordered: (AssertionError, r"\[\[0, 0, 0"),
    large_uploads_unordered: (AssertionError, "-9223372036854775808"),
    uploads_to_memory_in_use: (TooEarlyError, "by another that did not wait"),
    downloads_unordered: (TooEarlyError, "did not wait for the kernels"),
    sources_let_go: (TooEarlyError, "device memory was freed"),
}


@pytest.mark.parametrize("fault", FOUND)
def test_a_wait_that_is_left_out_is_found(fault: Fault) -> None:
    error, message = FOUND[fault]
    with pytest.raises(error, match=message), SlowDevice().installed() as device:
        run(device, fault=fault)


@pytest.mark.parametrize("where", ["pinned memory was written", "staging memory on the device"])
def test_staging_memory_used_again_too_early_is_found(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "device" not in where:
        monkeypatch.setattr("tests.slow_device.steps.Steps.staging", nothing)
    with pytest.raises(TooEarlyError, match=where), SlowDevice().installed() as device:
        run(device, collects=False, fault=ends_unawaited)
