"""The queue between threads: order, bounds, and an end that nobody waits for in vain."""

from __future__ import annotations

import threading

import pytest

from batchrun.runner.channel import Channel, Closed


def test_order_and_bound() -> None:
    channel: Channel[int] = Channel(3)
    taken: list[int] = []
    longest = 0

    def produce() -> None:
        for i in range(100):
            channel.put(i)
        channel.close()

    thread = threading.Thread(target=produce)
    thread.start()
    while len(taken) < 100:
        longest = max(longest, len(channel._items))
        taken += channel.take(2, None)
    thread.join()
    with pytest.raises(Closed):
        channel.take(1, None)
    assert taken == list(range(100))
    assert longest <= 3


def test_close_wakes_who_waits_to_put() -> None:
    channel: Channel[int] = Channel(1)
    channel.put(0)
    ended = threading.Event()

    def produce() -> None:
        try:
            channel.put(1)
        except Closed:
            ended.set()

    thread = threading.Thread(target=produce)
    thread.start()
    channel.close(discard=True)
    thread.join()
    assert ended.is_set()
    with pytest.raises(Closed):
        channel.take(1)


def test_close_wakes_who_waits_to_take() -> None:
    channel: Channel[int] = Channel(1)
    ended = threading.Event()

    def consume() -> None:
        try:
            channel.take(1, None)
        except Closed:
            ended.set()

    thread = threading.Thread(target=consume)
    thread.start()
    channel.close()
    thread.join()
    assert ended.is_set()


def test_what_was_put_before_the_end_can_be_taken() -> None:
    channel: Channel[int] = Channel(5)
    channel.put(1)
    channel.close()
    with pytest.raises(Closed):
        channel.put(2)
    assert channel.take(5) == [1]
    with pytest.raises(Closed):
        channel.take(5)


def test_nothing_yet_is_an_empty_list() -> None:
    channel: Channel[int] = Channel(5)
    assert channel.take(5) == []
    assert channel.take(5, 0.001) == []
