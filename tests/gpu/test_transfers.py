"""Inputs arrive before the kernels that read them, and stay until those have run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from batchrun.engine.transfers import CudaTransfers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LAG = 1


@pytest.fixture
def transfers() -> Iterator[CudaTransfers]:
    made = CudaTransfers(torch.device("cuda:0"), LAG, size=1 << 16)
    yield made
    made.drain()


def slow(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, a few milliseconds later."""
    torch.cuda._sleep(10_000_000)
    return tensor.clone()


@pytest.mark.parametrize("count", [3, 1000, 20_000])  # the last one does not fit the staging memory
def test_steps_in_flight_keep_their_own_inputs(transfers: CudaTransfers, count: int) -> None:
    sent, waiting, got = [], [], []
    for step in range(9):
        array = np.arange(count) * 100 + step
        with transfers.step():
            first = transfers.upload(array)
            second = transfers.upload(array + 50)
            array[:] = -1  # free at once
            transfers.started()
            waiting.append(transfers.download(slow(torch.cat([first, second]))))
        sent.append(np.arange(count) * 100 + step)
        while len(waiting) > LAG:
            got += waiting.pop(0).get()
    got += [numbers for download in waiting for numbers in download.get()]
    for step in range(9):
        assert got[step] == [*sent[step], *(sent[step] + 50)]


def test_time_is_split_into_steps_and_what_is_between_them(transfers: CudaTransfers) -> None:
    for _ in range(5):
        with transfers.step():
            sent = transfers.upload(np.arange(4))
            transfers.started()
            download = transfers.download(slow(sent))
        assert transfers.busy()
        assert download.get() == [[0, 1, 2, 3]]
        assert not transfers.busy()
    assert transfers.device_seconds > 0
    assert transfers.idle_seconds > 0
    transfers.drain()
    assert transfers.device_seconds == transfers.idle_seconds == 0


def test_several_tensors_arrive_as_one_step(transfers: CudaTransfers) -> None:
    with transfers.step():
        transfers.started()
        numbers = slow(transfers.upload(np.arange(3)))  # once it has started: at once
        download = transfers.download(numbers, numbers.float() / 2)
    assert download.get() == [[0, 1, 2], [0.0, 0.5, 1.0]]


def test_nothing_to_send_is_sent(transfers: CudaTransfers) -> None:
    with transfers.step():
        assert transfers.upload(np.array([], dtype=np.int64)).shape == (0,)
