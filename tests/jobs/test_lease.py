"""One worker per job, proven with real processes."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchrun.jobs.errors import LeaseHeld, OutputError
from batchrun.jobs.lease import Lease, held_by

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from batchrun.jobs.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder):
    """A process that holds the lease until its stdin closes or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_another_process_is_refused_and_the_holder_named(tmp_path):
    with holder(tmp_path) as process:
        assert held_by(tmp_path) == process.pid
        with pytest.raises(LeaseHeld, match=f"process {process.pid}") as refused:
            Lease(tmp_path).__enter__()
        assert f"batchrun cancel {tmp_path.name}" in refused.value.hint
        assert held_by(tmp_path) == process.pid


def test_sigkill_of_the_holder_frees_the_job(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert held_by(tmp_path) is None
        with Lease(tmp_path):
            assert held_by(tmp_path) == os.getpid()


def test_a_lease_that_ended_can_be_taken_again(tmp_path):
    assert held_by(tmp_path) is None
    for _ in range(2):
        with Lease(tmp_path):
            assert held_by(tmp_path) == os.getpid()
        assert held_by(tmp_path) is None


def test_an_error_inside_frees_the_job(tmp_path):
    with pytest.raises(ZeroDivisionError), Lease(tmp_path):
        raise ZeroDivisionError
    assert held_by(tmp_path) is None


def test_a_process_started_by_the_holder_does_not_keep_the_lease(tmp_path):
    with Lease(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        assert held_by(tmp_path) is None
        child.kill()


LOOK = """
import sys
from pathlib import Path
from batchrun.jobs.lease import held_by
print("looking", flush=True)
folder = Path(sys.argv[1])
while True:
    held_by(folder)
"""


def test_looking_never_makes_a_worker_believe_that_the_job_is_taken(tmp_path):
    with Lease(tmp_path):
        pass
    looker = subprocess.Popen(
        [sys.executable, "-c", LOOK, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with looker:
        try:
            assert looker.stdout.readline() == "looking\n"
            for _ in range(3000):
                with Lease(tmp_path):
                    pass
        finally:
            looker.kill()


CHILD = "import sys; print('has it', flush=True); sys.stdin.read()"


def test_a_child_that_inherits_the_lock_holds_it_until_it_ends_too(tmp_path):
    with Lease(tmp_path) as lease:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[lease.fileno()],
        )
    with child:
        assert child.stdout.readline() == b"has it\n"
        assert held_by(tmp_path) == os.getpid()
        with pytest.raises(LeaseHeld):
            Lease(tmp_path).__enter__()
        child.kill()
    assert held_by(tmp_path) is None


def test_a_wish_to_cancel_is_for_the_worker_that_has_the_job(tmp_path):
    (tmp_path / "cancel").write_text("")
    with Lease(tmp_path):
        assert not (tmp_path / "cancel").exists()
        (tmp_path / "cancel").write_text("")
    assert (tmp_path / "cancel").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(OutputError, match="lock can't be written"):
        Lease(tmp_path / "gone").__enter__()
