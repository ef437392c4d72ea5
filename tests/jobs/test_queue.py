"""One job at a time on a device, in order of arrival, also when those before it are killed."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from batchrun.jobs.errors import OutputError
from batchrun.jobs.queue import DeviceQueue, sweep

ROOT = Path(__file__).parents[2]
WAIT = """
import sys
from pathlib import Path
from batchrun.jobs.queue import DeviceQueue
with DeviceQueue(Path(sys.argv[1]), "cpu") as turn:
    print("in line", flush=True)
    for _ in sys.stdin:
        print(turn.ahead(), flush=True)
"""


class Waiter:
    """A process in the line for the device `cpu`."""

    def __init__(self, home):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WAIT, str(home)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout.readline() == "in line\n"

    def ahead(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def waiters(tmp_path):
    with ExitStack() as stack:

        def start():
            waiter = Waiter(tmp_path)
            stack.callback(waiter.kill)
            return waiter

        yield start


def test_first_come_first_served_whoever_is_killed(waiters):
    a, b, c, d = (waiters() for _ in range(4))
    assert [w.ahead() for w in (a, b, c, d)] == [
        "[]",
        str([a.pid]),
        str([a.pid, b.pid]),
        str([a.pid, b.pid, c.pid]),
    ]
    b.kill()  # while it waited
    assert c.ahead() == str([a.pid])
    a.kill()  # while it ran
    assert c.ahead() == "[]"
    assert d.ahead() == str([c.pid])
    e = waiters()
    assert e.ahead() == str([c.pid, d.pid])


def test_who_waits_knows_which_jobs_are_ahead(tmp_path):
    with (
        DeviceQueue(tmp_path, "cpu", "first-job") as first,
        DeviceQueue(tmp_path, "cpu") as second,
        DeviceQueue(tmp_path, "cpu", "third-job") as third,
    ):
        assert first.jobs_ahead() == []
        assert second.jobs_ahead() == ["first-job"]
        assert third.jobs_ahead() == ["first-job", ""]
        (tmp_path / "queue" / "cpu" / "1").write_text("12.5 ")
        assert third.ahead() == [0, os.getpid()]


def test_places_of_the_killed_go_and_those_of_the_living_stay(waiters, tmp_path):
    first, second, third = (waiters() for _ in range(3))
    for killed in (first, third):
        killed.kill()
    sweep(tmp_path)
    assert [path.name for path in (tmp_path / "queue" / "cpu").iterdir()] == ["2"]
    assert second.ahead() == "[]"
    with DeviceQueue(tmp_path, "cpu") as after:
        assert after.ahead() == [second.pid]


def test_devices_have_lines_of_their_own(tmp_path):
    with (
        DeviceQueue(tmp_path, "cpu") as a,
        DeviceQueue(tmp_path, "cuda:0") as b,
        DeviceQueue(tmp_path, "cpu") as c,
    ):
        assert (a.ahead(), b.ahead(), c.ahead()) == ([], [], [os.getpid()])
    with DeviceQueue(tmp_path, "cpu") as d:
        assert d.ahead() == []
        assert len(os.listdir(tmp_path / "queue" / "cpu")) == 1
    assert os.listdir(tmp_path / "queue" / "cpu") == []


def test_one_who_is_slow_to_take_a_number_does_not_get_before_one_who_runs(tmp_path, monkeypatch):
    """The slow one has counted; two come, the first of them goes, the second runs; now it links."""
    real = os.link
    runs = []

    def late(source, target):
        monkeypatch.setattr(os, "link", real)
        first = DeviceQueue(tmp_path, "cpu").__enter__()
        runs.append(DeviceQueue(tmp_path, "cpu").__enter__())
        first.__exit__(None, None, None)
        assert runs[0].ahead() == []
        real(source, target)

    monkeypatch.setattr(os, "link", late)
    with DeviceQueue(tmp_path, "cpu") as slow:
        assert slow.ahead() == [os.getpid()]
        assert runs[0].ahead() == []
        runs[0].__exit__(None, None, None)
        assert slow.ahead() == []


CROWD = """
import sys
from pathlib import Path
from batchrun.jobs.queue import DeviceQueue
for _ in range(40):
    with DeviceQueue(Path(sys.argv[1]), "cpu") as turn:
        while turn.ahead():
            pass
        inside = Path(sys.argv[1], "inside")
        inside.touch(exist_ok=False)
        inside.unlink()
"""


def test_no_two_ever_have_the_device(tmp_path):
    command = [sys.executable, "-c", CROWD, str(tmp_path)]
    crowd = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in crowd] == [0] * 4
    assert os.listdir(tmp_path / "queue" / "cpu") == []


def test_a_child_that_inherits_the_place_keeps_it(tmp_path):
    read = "import sys; sys.stdin.read()"
    with DeviceQueue(tmp_path, "cpu") as other:
        turn = DeviceQueue(tmp_path, "cpu").__enter__()
        child = subprocess.Popen(
            [sys.executable, "-c", read], stdin=subprocess.PIPE, pass_fds=[turn.fileno()]
        )
        os.close(turn.fileno())  # as if this process had died
        with DeviceQueue(tmp_path, "cpu") as last, child:
            assert len(last.ahead()) == 2
            child.kill()
            child.wait()
            assert len(last.ahead()) == 1
        assert other.ahead() == []


def test_a_home_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "queue").write_text("")
    with pytest.raises(OutputError, match="the job can't queue in"):
        DeviceQueue(tmp_path, "cpu").__enter__()
