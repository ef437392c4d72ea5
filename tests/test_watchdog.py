"""What hangs is told, and what was stopped does not hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

# Each sleep is a tenth of the limit, as far as the machine keeps to that.
MOVES = """
import os, threading, time
from batchrun.machine import bytes_written
from batchrun.runner.watchdog import Watchdog
def stalled(what, seconds):
    print(what, "has not ended in", seconds, "s", flush=True)
    os._exit(1)
dog = Watchdog(1, stalled)
dog.start()
with open(os.devnull, "wb", buffering=0) as file, dog.busy("writing", 2, bytes_written):
    for _ in range(40):
        file.write(b"data")
        time.sleep(0.1)
    print("moved", flush=True)
    threading.Event().wait()
"""

# Without the timer that needs no lock of the interpreter: it knows of no stops.
STOPPED = """
import faulthandler, os, signal, threading, time
from batchrun.runner.watchdog import Watchdog
faulthandler.dump_traceback_later = lambda *_, **__: None
def stalled(what, seconds):
    print(what, "has not ended in", seconds, "s", flush=True)
    os._exit(1)
dog = Watchdog(2, stalled)
dog.start()
with dog.busy("a step"):
    os.kill(os.getpid(), signal.SIGSTOP)
    {after}
print("ended")
"""


def woken_after_three_seconds(after: str) -> str:
    """What a process says that stops itself in a step, which may take two seconds."""
    command = [sys.executable, "-c", STOPPED.format(after=after)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        return process.communicate()[0]


def test_what_gets_on_does_not_hang() -> None:
    command = [sys.executable, "-c", MOVES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first, second = done.stdout.splitlines()
    assert first == "moved"
    assert second.startswith("writing has not ended in")


def test_a_process_that_was_stopped_does_not_hang() -> None:
    assert woken_after_three_seconds("time.sleep(0.5)") == "ended\n"


def test_one_that_hangs_after_it_was_stopped_does() -> None:
    said = woken_after_three_seconds("threading.Event().wait()")
    assert said.startswith("a step has not ended in")
