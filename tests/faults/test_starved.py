"""What a container, a file system or a limit does not allow: done otherwise, or named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from batchrun.cli.doctor import lacks
from batchrun.jobs.errors import LOCAL_DISK, JobError, OutputError
from batchrun.jobs.files import fsync_directory
from batchrun.jobs.folder import home
from batchrun.jobs.lease import Lease
from batchrun.jobs.output.destination import one_at_a_time
from batchrun.jobs.queue import DeviceQueue
from tests.faults import seccomp, shim
from tests.faults.seccomp import forbid
from tests.faults.smalljob import forked
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (reason := shim.unsupported_reason()) is not None:
        pytest.skip(reason)
    return shim.build(tmp_path_factory.mktemp("shim"))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def said_without(call: str, error: int, second: int | None, work: Callable[[], object]) -> str:
    """What `work` raises in a process that may not make a call: the error and its hint."""
    told, tell = os.pipe()

    def starved() -> int:
        forbid(call, error, second)
        try:
            work()
        except JobError as problem:
            os.write(tell, f"{type(problem).__name__}: {problem}; {problem.hint}".encode())
            return 0
        return 1

    assert forked(starved) == 0
    os.close(tell)
    with os.fdopen(told) as file:
        return file.read()


MEMORY = """
import errno, os
from tests.faults.seccomp import forbid
{forbidden}
from batchrun.allocator.host import HostMemory
from batchrun.allocator.vmm import AllocatorError
try:
    memory = HostMemory(4096, guard=False)
    base = memory.reserve(64 * 4096)
    pages = memory.create(8)
    memory.map(base, pages)
    memory.map(base + 32 * 4096, pages[:1])
    import ctypes
    ctypes.memset(base, 7, 4096)
    print(ctypes.string_at(base + 32 * 4096, 1)[0], os.readlink(f"/proc/self/fd/{{memory._fd}}"))
    memory.close()
except AllocatorError as error:
    print(type(error).__name__, error)
"""


@seccomp.needed
@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EACCES"])
def test_without_memfd_create_pages_are_of_dev_shm(error: str) -> None:
    done = python(MEMORY.format(forbidden=f"forbid('memfd_create', errno.{error})"))
    assert done.stdout.startswith("7 /dev/shm/"), done.stdout + done.stderr


@seccomp.needed
def test_a_forbidden_call_is_named() -> None:
    done = python(MEMORY.format(forbidden="forbid('fallocate', errno.EPERM)"))
    assert done.stdout.startswith("Refused fallocate failed for"), done.stdout + done.stderr
    assert "the system forbids fallocate; allow it in the container's seccomp" in done.stdout


def test_addresses_beyond_a_limit_name_it() -> None:
    code = """
    import resource
    from batchrun.allocator.host import HostMemory
    from batchrun.allocator.vmm import Refused
    memory = HostMemory(4096)
    for name in ("RLIMIT_AS", "RLIMIT_FSIZE"):
        before = resource.getrlimit(getattr(resource, name))
        resource.setrlimit(getattr(resource, name), (1 << 30, before[1]))
        try:
            memory.reserve(1 << 40)
        except Refused as error:
            print(error)
        resource.setrlimit(getattr(resource, name), before)
    """
    addresses, files = python(code).stdout.splitlines()
    assert "`ulimit -v unlimited`" in addresses
    assert "`ulimit -f unlimited`" in files


def test_a_machine_that_refuses_memory_blames_no_row() -> None:
    code = """
    import os, resource
    from batchrun.allocator.arena import KVArena
    from batchrun.allocator.host import HostMemory
    from batchrun.allocator.layout import KVLayout, LayerKV
    from batchrun.engine.core import EngineError, Request, SamplingParams, Sequence
    from batchrun.engine.scheduler import Scheduler
    layout = KVLayout((LayerKV(1, 32, 32),), 4, 4096, 256, 1)
    arena = KVArena(HostMemory(4096, guard=False), layout, num_slots=2)
    scheduler = Scheduler(arena, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # from now on no page can be had
    sequence = Sequence(Request(0, 0, (1,) * 40, SamplingParams(max_tokens=8), 0))
    scheduler.add(sequence)
    try:
        print(scheduler.plan(), scheduler.rejected)
    except EngineError as error:
        print(error, "/", error.hint)
    """
    done = python(code)
    assert done.stdout.startswith("there is no memory for a single row: cannot commit"), done
    assert "ulimit -f" in done.stdout
    assert "batchrun resume" in done.stdout


@seccomp.needed
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(error: int, tmp_path: Path) -> None:
    def lease() -> None:
        with Lease(tmp_path):
            pass

    def turn() -> None:
        with DeviceQueue(tmp_path, "cpu"):
            pass

    def submitting() -> None:
        with one_at_a_time(tmp_path):
            pass

    for call, second, work in (
        ("fcntl", fcntl.F_OFD_SETLK, lease),
        ("fcntl", fcntl.F_OFD_SETLK, turn),
        ("flock", None, submitting),
    ):
        said = said_without(call, error, second, work)
        assert said.startswith(OutputError.__name__)
        assert LOCAL_DISK in said


@seccomp.needed
def test_doctor_tries_what_jobs_need_of_a_folder(tmp_path: Path) -> None:
    def found(call: str, error: int, second: int | None = None) -> list[str]:
        def work() -> None:
            raise JobError("\n".join(lacks(tmp_path)))

        return said_without(call, error, second, work).splitlines()

    assert lacks(tmp_path) == []
    assert "does not support locks" in found("fcntl", errno.ENOLCK, fcntl.F_OFD_SETLK)[0]
    assert "memory shared by processes" in found("fcntl", errno.EINVAL, fcntl.F_SETLK)[0]
    assert "does not support hard links" in found("link", errno.EPERM)[0]
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_synced_alone_is_synced_with_its_file_system() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY))
    fsync_directory(Path("/proc"))


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987654321)  # of which /etc/passwd knows nothing
    with pytest.raises(JobError, match="987654321") as caught:
        home({})
    assert "BATCHRUN_HOME" in str(caught.value.hint)


def test_threads_that_cannot_be_started_are_done_without_or_named(library: Path) -> None:
    code = """
    import errno, os
    from batchrun import machine
    from tests.faults import shim
    machine.cores = lambda root=None: 16
    os.sched_getaffinity = lambda pid: range(16)
    for at in (8, 2):
        os.environ.pop("OMP_NUM_THREADS", None)
        shim.arm(shim.Fault.FAIL, {shim.Kind.THREAD}, at, errno.EAGAIN)
        shim.for_good()
        try:
            print(machine.use_cores(), os.environ.get("OMP_NUM_THREADS"))
        except machine.MachineError as error:
            print(error, "/", error.hint)
    """
    fewer, refused = python(code, LD_PRELOAD=str(library)).stdout.splitlines()
    assert fewer == "computing with 2 threads instead of 16: no more can start 2"
    assert refused.startswith("only 1 threads can start")
    assert "ulimit -u" in refused


def test_a_run_that_dies_without_a_word_is_told_by_what_it_printed_last(tmp_path: Path) -> None:
    """A library ends the process, as OpenMP does where it can't have a thread."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'run-job' in sys.orig_argv:\n"
        "    os.write(2, b'libgomp: Thread creation failed: Resource temporarily unavailable\\n')\n"
        "    os._exit(1)\n"
    )
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text('{"prompt": "one"}\n')
    done = subprocess.run(
        [
            *(sys.executable, "-m", "batchrun", "submit", prompts, "--max-tokens", "2"),
            *("-m", write_tiny_model(tmp_path / "tiny"), "-o", tmp_path / "out.jsonl"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "BATCHRUN_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
        },
    )
    assert "exit code 1 before it could say why" in done.stderr
    assert "libgomp: Thread creation failed" in done.stderr
    assert "batchrun resume" in done.stderr
    assert "interrupted after 0 of" in done.stdout


def test_doctor_says_what_is_limited_and_what_to_type() -> None:
    code = """
    import json, resource
    from batchrun.cli import doctor as limits
    for name in ("RLIMIT_FSIZE", "RLIMIT_AS"):
        resource.setrlimit(getattr(resource, name), (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    print(json.dumps([limits.limits(), list(limits.lacking())]))
    """
    done = python(code)
    shown, problems = json.loads(done.stdout)
    assert shown["addresses"] == "4.0 GiB (ulimit -v unlimited)", done.stderr
    assert shown["size of a file, and of KV memory"] == "4.0 GiB (ulimit -f unlimited)"
    assert any("32 files" in problem and "ulimit -n" in problem for problem in problems)
    assert any("ulimit -f unlimited" in problem for problem in problems)


@seccomp.needed
def test_doctor_says_that_memory_comes_from_elsewhere() -> None:
    code = """
    import errno
    from batchrun.cli import doctor as limits
    from tests.faults.seccomp import forbid
    print(limits.fallbacks())
    forbid("memfd_create", errno.EPERM)
    print(limits.fallbacks()["memfd_create"])
    """
    nothing, told = python(code).stdout.splitlines()
    assert nothing == "{}"
    assert "/dev/shm" in told
    assert "--shm-size" in told
