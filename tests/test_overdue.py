"""A prompt that takes too long ends, and nothing else does."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from batchrun.jobs.inflight import Making, ReaderNote
from batchrun.runner import overdue
from batchrun.runner.overdue import Onlooker, Overdue, PromptLimit, place_of

ROOT = Path(__file__).parents[1]


def endless(*, catching: int = 0) -> Callable[[], None]:
    """Something that never ends and catches what comes, as often as told to."""

    def loop() -> None:
        caught = 0
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue
            except BaseException:
                caught += 1
                if caught > catching:
                    raise

    return loop


@pytest.mark.parametrize("catching", [0, 2])
def test_python_that_never_ends_is_ended_whatever_it_catches(catching: int) -> None:
    with PromptLimit(limit_s=0.1) as limit:
        with pytest.raises(Overdue):
            limit.made(3, endless(catching=catching))
        assert limit.note.at() is None
        assert limit.made(4, lambda: "fine") == "fine"


def test_what_sleeps_takes_no_processor_time() -> None:
    with PromptLimit(limit_s=0.01) as limit:
        assert limit.made(1, lambda: time.sleep(0.5) or "slept") == "slept"


def test_nothing_but_the_prompt_is_struck() -> None:
    """Another thread strikes at every prompt that it sees: each strike comes in `made` or never."""
    limit, ended, struck = PromptLimit(), threading.Event(), 0

    def strike() -> None:
        while not ended.is_set():
            at = limit.note.at()
            if isinstance(at, Making):
                limit._strike(at)

    def prompt(row: int) -> int:
        while row % 100 == 0:  # until it is struck
            pass
        return sum(range(20)) + row

    thread = threading.Thread(target=strike)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for row in range(20_000):
            try:
                assert limit.made(row, functools.partial(prompt, row)) == 190 + row
            except Overdue:
                struck += 1
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert struck >= 200


BURN = """
import sys, threading
from pathlib import Path
from batchrun.jobs.inflight import ReaderNote
note = ReaderNote(Path(sys.argv[1]))
def beat():
    while True:
        note.beat()
        threading.Event().wait(0.01)
threading.Thread(target=beat, daemon=True).start()
note.making(7)
print("begun", flush=True)
if sys.argv[2] == "sleeps":
    threading.Event().wait()
held = []
while True:
    if sys.argv[2] == "grows":
        held.append(bytearray(b"x") * (1 << 22))
"""


def looked(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    look: Callable[[int, Onlooker], object],
) -> None:
    """Have an onlooker look at a process that makes the prompt of row 7 without end."""
    monkeypatch.setenv("BATCHRUN_PROMPT_SECONDS", "0.1" if what == "runs" else "1000")
    monkeypatch.setenv("BATCHRUN_STALL_SECONDS", "0.2" if what == "sleeps" else "1000")
    monkeypatch.setattr(overdue, "_MEMORY", 1 << 26)
    note = ReaderNote(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", BURN, str(folder), what],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        look(process.pid, Onlooker(process.pid, note))
    finally:
        process.kill()
        process.communicate()
        note.close()


SAID = {
    "runs": "building its prompt took more than 0.1 s of processor time",
    "sleeps": "building its prompt did not finish in 0.2 s",
    "grows": "building its prompt took more than 0.0625 GiB of memory",
}


@pytest.mark.parametrize("what", SAID)
def test_an_onlooker_says_what_has_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def look(_: int, onlooker: Onlooker) -> None:
        while (found := onlooker.look()) is None:
            time.sleep(0.05)
        assert (found.at.row, found.reason) == (7, SAID[what])
        assert found.certain == (what != "grows")

    looked(tmp_path, monkeypatch, what, look)


@pytest.mark.parametrize("what", ["runs", "sleeps"])
def test_a_process_that_is_stopped_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def look(pid: int, onlooker: Onlooker) -> None:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        for _ in range(10):
            assert onlooker.look() is None
            time.sleep(0.1)
        os.kill(pid, signal.SIGCONT)
        while onlooker.look() is None:
            time.sleep(0.05)

    looked(tmp_path, monkeypatch, what, look)


def test_a_stack_says_where_it_was() -> None:
    def _encode() -> None:
        raise Overdue

    with pytest.raises(Overdue) as caught:
        _encode()
    assert place_of(caught.value.__traceback__) == ", in the tokenizer"
