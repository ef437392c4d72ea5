"""The machine and this process, as Linux describes them."""

from __future__ import annotations

import _thread
import ctypes
import gc
import math
import mmap
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from batchrun import cgroups, platforms
from batchrun.errors import MachineError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_BEGIN_S = 30  # time for a thread to begin
OWN_THREADS = 5  # of a run: watchdog, lost threads, prompt limit, reader, journal
THREADS_HINT = "raise the limit of processes (ulimit -u, or the container's pids.max)"
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux calls them; the last one on Arm


def cpu_features() -> str:
    """The processor's features as Linux lists them, in one line; empty if it lists none."""
    return _of_cpu("flags", "Features")


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions to multiply bfloat16."""
    return not _BFLOAT16.isdisjoint(cpu_features().split())


def description() -> str:
    """The processor's name and its cores, for benchmarks."""
    return f"{_of_cpu('model name') or platform.machine()}, {os.cpu_count()} cores"


def affinity() -> set[int]:
    """The processors that this process may run on."""
    return platforms.affinity()


def cores(root: Path = cgroups.ROOT) -> int:
    """Number of processors this process may keep busy, by its affinity and its groups' quota."""
    allowed = len(affinity())
    quota = cgroups.cpu_quota(root)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def use_cores(root: Path = cgroups.ROOT) -> str | None:
    """Keep libraries from starting more threads than can run; call it before they are loaded.

    Beyond a CPU quota, all threads stall for the rest of each period; beyond a limit on processes,
    OpenMP ends the process. Nor may threads that wait for work keep a core busy for long.

    Returns:
        A message for the user, if there is one.

    Raises:
        MachineError: Beside our own threads there is no room for even one more.
    """
    # How long a thread of torch's OpenMP spins for work before it sleeps. The default gains nothing
    # over this on an idle machine, and makes a step three times as slow when another process wants
    # a core (benchmarks/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    wanted = cores(root)
    room = startable_threads(wanted + OWN_THREADS) - OWN_THREADS
    if room < 1:
        raise MachineError(
            f"only {room + OWN_THREADS} threads can start, and a run needs at least "
            f"{1 + OWN_THREADS}",
            hint=THREADS_HINT,
        )
    if min(wanted, room) < len(affinity()):
        os.environ.setdefault("OMP_NUM_THREADS", str(min(wanted, room)))
    if room < wanted:
        return f"computing with {room} threads instead of {wanted}: no more can start"
    return None


def has_idle_core() -> bool:
    """Whether a core is idle now, beside the one that this process uses."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return False
    return running < (os.cpu_count() or 1) and cores() > 1


@contextmanager
def importing() -> Iterator[None]:
    """Pause garbage collection while torch is imported: it finds nothing and takes a tenth."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def startable_threads(most: int) -> int:
    """How many more threads can be started; stops at `most`."""
    ended = threading.Event()
    started: list[threading.Thread] = []
    try:
        while len(started) < most:
            thread = threading.Thread(target=ended.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:  # "can't start new thread"
        pass
    finally:
        ended.set()
        for thread in started:
            thread.join()
    return len(started)


def read_ahead(folder: Path) -> None:
    """Have the system read a model's weights into memory, while this process imports torch.

    Only a hint: where it fails, they are read when they are loaded.
    """

    def advise() -> None:
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    with suppress(RuntimeError):  # no thread can be started
        threading.Thread(target=advise, name="read ahead", daemon=True).start()


def start(*threads: threading.Thread) -> None:
    """Start threads.

    Raises:
        MachineError: The system refuses one; those before it have been started.
    """
    for thread in threads:
        try:
            thread.start()
        except RuntimeError as error:
            raise MachineError(
                f"the thread {thread.name!r} can't be started", hint=THREADS_HINT
            ) from error


def available_memory(root: Path = cgroups.ROOT) -> int:
    """Bytes still available without swapping, on the machine or in this control group."""
    available = proc_bytes(root / "proc/meminfo", "MemAvailable")
    if available is None:
        available = platforms.physical_memory()[1]
    limit = cgroups.memory_limit(root)
    return available if limit is None else min(available, limit.free)


def end_with_lost_threads(end: Callable[[str], None]) -> None:
    """Have `end` called if a thread dies before its first line because memory ran out.

    The code that starts such a thread, in any library, waits forever for a sign that it runs. `end`
    is called in a thread of its own with what happened, and must end the process.

    Raises:
        MachineError: That thread can't be started.
    """
    # Without memory for a first line of Python there is none for a Python hook: `put` is C.
    told: SimpleQueue[sys.UnraisableHookArgs] = SimpleQueue()
    begun = threading.Event()

    def watch() -> None:
        begun.set()
        waited: dict[threading.Thread, int] = {}
        while True:
            with suppress(Empty):
                found = told.get(timeout=1)
                with suppress(MemoryError):
                    sys.__unraisablehook__(found)
                if getattr(found.object, "__func__", None) is threading.Thread._bootstrap:  # type: ignore[attr-defined]
                    end(f"a thread could not start: {found.exc_type.__name__}")
                del found
            # If a library audits what Python does, as filelock does from 3.12 on, no hook is
            # called. Threads that were started but have not begun are in limbo.
            limbo = list(getattr(threading, "_limbo", ()))
            waited = {thread: waited.get(thread, 0) + 1 for thread in limbo}
            if max(waited.values(), default=0) > _BEGIN_S:
                end(f"a thread did not start within {_BEGIN_S} s")

    sys.unraisablehook = told.put
    with suppress(RuntimeError):
        _thread.start_new_thread(watch, ())  # which, unlike `Thread.start`, waits for no sign
        for _ in range(_BEGIN_S):
            if begun.wait(1):
                return
    raise MachineError("no thread can start", hint=THREADS_HINT)


def memory() -> dict[str, int]:
    """Bytes of memory of the whole machine, and those still available to this process."""
    total = proc_bytes(Path("/proc/meminfo"), "MemTotal")
    return {"total": total or platforms.physical_memory()[0], "available": available_memory()}


def rss() -> int:
    """Bytes of memory that this process has now; 0 if the kernel does not say."""
    return proc_bytes(Path("/proc/self/status"), "VmRSS") or 0


def peak_rss() -> int:
    """The most bytes of memory that this process has had."""
    own = proc_bytes(Path("/proc/self/status"), "VmHWM")
    return own or platforms.most_memory()


def bytes_written() -> int:
    """What this process has written so far, to anything; 0 if the kernel does not say."""
    return int(_line(Path("/proc/self/io"), "wchar") or 0)


def return_freed_memory() -> None:
    """Have the C library return large freed blocks to the kernel."""
    _tune_heap(128 << 10, 128 << 10)


def keep_freed_memory() -> None:
    """Have the C library keep freed blocks, except those that are free now.

    Otherwise the kernel would create and zero each step's allocations page by page, every time
    (benchmarks/README.md).
    """
    _tune_heap(128 << 20, 256 << 20)


def _tune_heap(mapped: int, trimmed: int) -> None:
    """Set the sizes from which blocks get a mapping, and the heap's free end goes back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


class MappedFiles:
    """The files that this process has mapped for itself and, so far, only read."""

    def __init__(self) -> None:
        self._ranges: list[range] = []
        mapped = range(0)
        for line in filter(None, cgroups.lines_of(Path("/proc/self/smaps"))):
            name, *values = line.split()
            if not name.endswith(":"):  # a new mapping: 7f00-7f80 r--p 0 08:01 1234 /a/file
                private = values[0][3] == "p" and values[3] != "0"
                first, end = (int(part, 16) for part in name.split("-"))
                mapped = range(first, end) if private else range(0)
            elif name == "Anonymous:" and values[0] == "0" and mapped:
                self._ranges.append(mapped)

    def forget(self, address: int, size: int) -> None:
        """Drop pages of such a file from memory; whoever reads them again gets them from the file.

        Args:
            address: Where what is no longer needed begins.
            size: Its bytes.
        """
        page = mmap.PAGESIZE
        first, end = -(-address // page) * page, (address + size) // page * page
        if first < end and any(first in mapped and end <= mapped.stop for mapped in self._ranges):
            libc, dont_need = ctypes.CDLL(None), 4
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), dont_need)


def proc_bytes(path: Path, name: str) -> int | None:
    """The bytes that a file states, in kB, after a name; None if it does not."""
    found = _line(path, name)
    return int(found.split()[0]) * 1024 if found else None


def _of_cpu(*names: str) -> str:
    return _line(Path("/proc/cpuinfo"), *names)


def _line(path: Path, *names: str) -> str:
    """The text after the colon of the first line that begins with one of the names, or "".

    Also "" if there is no such file: a container may lack /proc.
    """
    lines = cgroups.lines_of(path)
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
