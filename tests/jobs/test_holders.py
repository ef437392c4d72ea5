"""Signals reach the processes that have a job's lock, and nobody else, whatever its file says."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from batchrun.jobs.errors import JobError, LeaseHeld
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.holders import holders, lock, process, send
from batchrun.jobs.lease import Lease, held_by, holder
from batchrun.jobs.snapshot import JobSnapshot
from tests.cli.test_async import until

ROOT = Path(__file__).parents[2]
CANCEL = "from batchrun.jobs.cancel import cancel; from batchrun.jobs.folder import JobFolder; "
HOLD = """
import signal, subprocess, sys
from pathlib import Path
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.lease import Lease
with Lease(Path(sys.argv[1])) as lease:
    exec(sys.argv[2])
    print("ready", flush=True)
    while True:
        signal.pause()
"""
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
WITH_CHILD = (
    "child = [sys.executable, '-c', 'import sys; sys.stdin.read()'];"
    "subprocess.Popen(child, stdin=subprocess.PIPE, pass_fds=[lease.fileno()])"
)


@pytest.fixture
def start():
    """Starts processes that are killed in the end."""
    with ExitStack() as stack:

        def begin(*command, cwd=ROOT):
            pipe = subprocess.PIPE
            started = subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, text=True)
            stack.enter_context(started)
            stack.callback(started.kill)
            return started

        yield begin


@pytest.fixture
def worker(start, tmp_path):
    """Starts a process that has the lease of a job that runs."""

    def begin(first="pass"):
        JobSnapshot("running").save(tmp_path)
        started = start(sys.executable, "-c", HOLD, str(tmp_path), first)
        assert started.stdout.readline() == "ready\n"
        return started

    return begin


def cancelled(folder, ask_s=5.0, kill_s=5.0):
    from batchrun.jobs.cancel import cancel  # noqa: PLC0415

    return cancel(JobFolder(folder), ask_s, kill_s)


def test_who_has_the_lock_is_told_and_not_who_looks_or_was_refused(worker, start, tmp_path):
    assert holders(tmp_path / "lock") == []
    first = worker(WITH_CHILD)
    looks = (tmp_path / "lock").open("rb")
    refused = (tmp_path / "lock").open("r+b")
    with looks, refused:
        with pytest.raises(BlockingIOError):
            lock(refused)
        parent, child = holders(tmp_path / "lock")
    assert (parent.pid, child.parent) == (first.pid, first.pid)
    assert holder(tmp_path) == f"process {first.pid}"
    with pytest.raises(LeaseHeld, match=f"by process {first.pid}") as error:
        Lease(tmp_path).__enter__()
    assert error.value.hint == f"batchrun watch {tmp_path.name}, or batchrun cancel {tmp_path.name}"


def test_a_signal_goes_to_who_has_the_lock_now(worker, start, tmp_path):
    first = worker()
    [found] = holders(tmp_path / "lock")
    stranger = start(sys.executable, "-c", "input()")
    assert not send(tmp_path / "lock", process(stranger.pid), signal.SIGKILL)
    number_of_another = type(found)(stranger.pid, found.started, found.parent)
    assert not send(tmp_path / "lock", number_of_another, signal.SIGKILL)
    earlier = type(found)(found.pid, found.started - 1, found.parent)
    assert not send(tmp_path / "lock", earlier, signal.SIGKILL)
    assert (first.poll(), stranger.poll()) == (None, None)
    assert send(tmp_path / "lock", found, signal.SIGTERM)
    assert first.wait(60) == -signal.SIGTERM
    assert not send(tmp_path / "lock", found, signal.SIGTERM)


def test_where_there_are_no_pidfds_who_has_the_lock_is_asked_all_the_same(
    worker, start, tmp_path, monkeypatch
):
    def none(pid):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", none)
    first = worker()
    stranger = start(sys.executable, "-c", "input()")
    assert not send(tmp_path / "lock", process(stranger.pid), signal.SIGKILL)
    assert send(tmp_path / "lock", holders(tmp_path / "lock")[0], signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    assert stranger.poll() is None


def test_where_the_kernel_shows_no_locks_a_worker_is_known_by_its_command(
    start, tmp_path, monkeypatch
):
    monkeypatch.setattr("batchrun.jobs.holders._kernel_tells", lambda: False)
    script = "import os, sys; os.open(sys.argv[1] + '/lock', os.O_RDWR); print(flush=True); input()"
    (tmp_path / "lock").write_text("")
    worker = start(sys.executable, "-c", script, str(tmp_path))
    ahead = start(sys.executable, "-c", script, f"{tmp_path}/", "batchrun", "work", "--parent", "7")
    other = start(sys.executable, "-c", script, f"{tmp_path}/")
    looks = start(sys.executable, "-c", script.replace("RDWR", "RDONLY"), str(tmp_path))
    for started in (worker, ahead, other, looks):
        started.stdout.readline()
    assert {found.pid for found in holders(tmp_path / "lock")} == {worker.pid, ahead.pid}


@pytest.mark.parametrize(
    "content",
    [b"", b"-1", b"0", b"1", b"\xff\xfe\x00", b"[]", b'{"pid": -1}', b'{"pid": true}', b"STRANGER"],
)
def test_cancel_ends_the_job_and_nobody_else_whatever_its_lock_says(
    worker, start, tmp_path, content
):
    stranger = start(sys.executable, "-c", "input()")
    first = worker()
    number = str(stranger.pid).encode()
    (tmp_path / "lock").write_bytes(number if content == b"STRANGER" else content)
    assert held_by(tmp_path) == 0
    if content == b"STRANGER":
        noted = b'{"pid": %s, "started": 1, "host": "", "boot": "", "space": 0}' % number
        (tmp_path / "lock").write_bytes(noted)
        assert held_by(tmp_path) == stranger.pid
    assert holder(tmp_path) == f"process {first.pid}"
    assert cancelled(tmp_path) == f"{tmp_path.name} is cancelled"
    assert first.wait(60) == -signal.SIGTERM
    assert stranger.poll() is None
    assert held_by(tmp_path) is None


def test_who_ignores_the_question_is_killed_and_that_is_said(worker, tmp_path):
    first = worker(IGNORE)
    said = cancelled(tmp_path, ask_s=0.2)
    assert "it did not stop within 0.2 s, so it was killed" in said
    assert "journalled results are kept" in said
    assert first.wait(60) == -signal.SIGKILL
    assert JobSnapshot.load(tmp_path).state == "cancelled"


def test_who_is_stopped_is_continued_to_end_by_itself(worker, tmp_path):
    end = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    first = worker(end)
    first.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)
    assert cancelled(tmp_path, ask_s=60) == f"{tmp_path.name} is cancelled"
    assert first.wait(60) == 7


def test_a_child_that_is_left_of_a_job_is_ended_too(worker, tmp_path):
    first = worker(WITH_CHILD)
    first.kill()
    first.wait(60)
    assert held_by(tmp_path) == first.pid  # what its note says: the child has not noted itself
    assert len(holders(tmp_path / "lock")) == 1
    cancelled(tmp_path)
    assert held_by(tmp_path) is None


def test_a_job_at_rest_that_is_being_exported_is_not_cancelled(worker, tmp_path):
    first = worker()
    JobSnapshot("done").save(tmp_path)
    with pytest.raises(JobError, match=f"it is done, but process {first.pid} uses it"):
        cancelled(tmp_path)
    assert first.poll() is None


def test_what_is_killed_and_does_not_end_is_told_with_its_state(worker, start, tmp_path):
    """A thread waits for a vfork'ed child where no signal but a deadly one reaches it: state D.

    Its process's first thread has ended, as it does at once when a process is killed.
    """
    source = tmp_path / "d.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <pthread.h>\n#include <unistd.h>\n"
        'void *stuck(void *_) { if (vfork() == 0) { write(1, "\\n", 1); pause(); _exit(0); } }\n'
        "int main(void) {\n"
        "  pthread_t id; pthread_create(&id, 0, stuck, 0); pthread_exit(0);\n}\n"
    )
    program = tmp_path / "d"
    if subprocess.run(["cc", "-w", "-pthread", "-o", program, source], check=False).returncode:
        pytest.skip("there is no C compiler")
    JobSnapshot("running").save(tmp_path)
    with Lease(tmp_path) as lease:
        stuck = subprocess.Popen(
            [program], stdout=subprocess.PIPE, pass_fds=[lease.fileno()], start_new_session=True
        )
        stuck.stdout.readline()
    until(lambda: [one.state() for one in holders(tmp_path / "lock")][:1] == ["D"], "state D")
    try:
        with pytest.raises(JobError, match=rf"process {stuck.pid} \(state D\)") as error:
            cancelled(tmp_path, ask_s=-1, kill_s=-1)  # as if the kernel did not answer
        assert "waits in the kernel" in error.value.hint
    finally:
        os.killpg(stuck.pid, signal.SIGKILL)
        stuck.communicate()


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")


@pytest.mark.parametrize(
    ("boot", "where"), [(None, "of another container"), ("b" * 36, "on the machine")]
)
def test_a_job_of_another_container_or_machine_is_told_as_such(worker, tmp_path, boot, where):
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace can be made")
    first = worker()
    if boot:
        noted = (tmp_path / "lock").read_text()
        here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert here in noted
        (tmp_path / "lock").write_text(noted.replace(here, boot))
    code = CANCEL + f"cancel(JobFolder(__import__('pathlib').Path({str(tmp_path)!r})))"
    command = [*NAMESPACE, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()[-2]  # the last one is the hint
    assert f"is being run by process {first.pid} {where}" in said
    assert "which can't be stopped from here" in said
    assert first.poll() is None
    assert held_by(tmp_path) == first.pid
    assert not (tmp_path / "cancel").exists()
