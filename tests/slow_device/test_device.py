"""The slow device itself: when something is over, and what is seen of it before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.slow_device.device import SlowDevice, TooEarlyError

GARBAGE = torch.iinfo(torch.int64).max


@pytest.fixture
def device() -> Iterator[SlowDevice]:
    with SlowDevice().installed() as device:
        yield device


def pinned(*numbers: int) -> torch.Tensor:
    return torch.empty(len(numbers), dtype=torch.int64, pin_memory=True).copy_(
        torch.tensor(numbers)
    )


def test_waiting_finishes_what_came_before_and_no_more(device: SlowDevice) -> None:
    one, other, third = (torch.cuda.Stream() for _ in range(3))
    events = [torch.cuda.Event() for _ in range(5)]
    events[0].record(one)
    events[1].record(third)
    other.wait_stream(one)
    events[2].record(other)
    events[3].record(one)
    events[4].record(other)
    assert not any(event.query() for event in events)
    events[2].synchronize()
    assert [event.query() for event in events] == [True, False, True, False, False]
    one.synchronize()
    assert [event.query() for event in events] == [True, False, True, True, False]
    torch.cuda.synchronize()
    assert all(event.query() for event in events)


def test_an_event_that_was_recorded_again_is_as_late_as_the_last_time(device: SlowDevice) -> None:
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert end.query(), "never recorded"
    with pytest.raises(torch.AcceleratorError, match="invalid resource handle"):
        begin.elapsed_time(end)
    begin.record(stream)
    end.record(stream)
    with pytest.raises(torch.AcceleratorError, match="not ready"):
        begin.elapsed_time(end)
    end.synchronize()
    assert begin.elapsed_time(end) > 0
    end.record(stream)
    with pytest.raises(torch.AcceleratorError, match="not ready"):
        begin.elapsed_time(end)


def test_an_early_device_finishes_something_now_and_then() -> None:
    seen = set()
    for seed in range(20):
        with SlowDevice(early=0.3, seed=seed).installed():
            events = [torch.cuda.Event() for _ in range(4)]
            for event in events:
                event.record(torch.cuda.current_stream())
            over = [event.query() for event in reversed(events)]
            assert over == sorted(over), "each one before those behind it"
            seen.add(sum(over))
    assert len(seen) > 2


def test_the_host_sees_garbage_until_a_download_is_over(device: SlowDevice) -> None:
    compute, down = torch.cuda.Stream(), torch.cuda.Stream()
    host, arrived = pinned(0, 0), torch.cuda.Event()
    with torch.cuda.stream(compute):
        numbers = torch.tensor([1, 2]) + 5
        down.wait_stream(compute)
        with torch.cuda.stream(down):
            host.copy_(numbers, non_blocking=True)
            arrived.record(down)
    compute.synchronize()
    assert host.tolist() == [GARBAGE, GARBAGE]
    arrived.synchronize()
    assert host.tolist() == [6, 7]


def test_a_download_waits_for_the_kernels_before_it(device: SlowDevice) -> None:
    compute, down = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(compute):
        down.wait_stream(compute)
        numbers = torch.tensor([1, 2]) + 5
        with (
            torch.cuda.stream(down),
            pytest.raises(TooEarlyError, match="did not wait for the kernels before it"),
        ):
            pinned(0, 0).copy_(numbers, non_blocking=True)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("change", ["written", "freed"])
def test_the_source_of_a_download_stays_until_it_is_over(
    device: SlowDevice, change: str, ordered: bool
) -> None:
    compute, down = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(compute):
        numbers = torch.tensor([1, 2]) + 5
        down.wait_stream(compute)
        with torch.cuda.stream(down):
            host = pinned(0, 0)
            host.copy_(numbers, non_blocking=True)
        if ordered:
            compute.wait_stream(down)
        if change == "written":
            numbers += 1
        else:
            del numbers
    if ordered:
        down.synchronize()
        assert host.tolist() == [6, 7]
    else:
        with pytest.raises(TooEarlyError, match=f"device memory was {change} before it was copied"):
            down.synchronize()


@pytest.mark.parametrize("ordered", [False, True])
def test_another_stream_sees_garbage_until_it_is_ordered_behind_an_upload(
    device: SlowDevice, ordered: bool
) -> None:
    compute, up = torch.cuda.Stream(), torch.cuda.Stream()
    target = torch.zeros(2, dtype=torch.int64)
    with torch.cuda.stream(compute):
        with torch.cuda.stream(up):
            target.copy_(pinned(3, 4), non_blocking=True)
        if ordered:
            compute.wait_stream(up)
        assert (target.clone().tolist() == [3, 4]) == ordered
        with torch.cuda.stream(up):
            pass
        assert (target.tolist() == [3, 4]) == ordered


def test_the_source_of_an_upload_stays_until_it_is_over_even_for_a_stream_behind_it(
    device: SlowDevice,
) -> None:
    compute, up = torch.cuda.Stream(), torch.cuda.Stream()
    source, target = pinned(3, 4), torch.zeros(2, dtype=torch.int64)
    with torch.cuda.stream(compute):
        with torch.cuda.stream(up):
            target.copy_(source, non_blocking=True)
        compute.wait_stream(up)
    source[0] = 5
    with pytest.raises(TooEarlyError, match="pinned memory was written before it was copied"):
        compute.synchronize()


def test_a_block_that_ends_checks_what_nobody_waited_for() -> None:
    def block() -> None:
        with SlowDevice().installed():
            source = pinned(3, 4)
            torch.zeros(2, dtype=torch.int64).copy_(source, non_blocking=True)
            source[0] = 5

    with pytest.raises(TooEarlyError, match="pinned memory was written"):
        block()


def test_copies_of_the_current_stream_are_in_order(device: SlowDevice) -> None:
    compute = torch.cuda.Stream()
    target = torch.zeros(1, dtype=torch.int64)
    with torch.cuda.stream(compute):
        for number in (1, 2):
            target.copy_(pinned(number), non_blocking=True)
            assert target.tolist() == [number]
            target += 5
    compute.synchronize()
    assert target.tolist() == [7]


def test_copies_apart_may_read_and_write_what_those_before_them_did(device: SlowDevice) -> None:
    compute, aside = torch.cuda.Stream(), torch.cuda.Stream()
    one, other, third = (torch.tensor([n, n + 1]) for n in (1, 3, 5))
    with torch.cuda.stream(compute):
        with torch.cuda.stream(aside):
            other.copy_(one, non_blocking=True)
            one.copy_(other, non_blocking=True)
            other.copy_(third, non_blocking=True)
        compute.wait_stream(aside)
        assert (one.tolist(), other.tolist()) == ([1, 2], [5, 6])
