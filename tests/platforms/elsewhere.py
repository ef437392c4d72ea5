"""Runs a command as macOS or Windows would, as far as Linux can play them.

    python -m tests.platforms.elsewhere win32 export JOB -o out.csv

What the other system lacks is taken away before batchrun is imported: modules, functions, signals,
flags, /proc. Windows also refuses to open a folder, and to rename or remove a file that is open.
What it has instead of them, such as msvcrt, is played here. Other libraries are loaded first: they
must believe that they are at home. So this proves that batchrun does without what those systems
lack, and not that its libraries work there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import multiprocessing.connection
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import types
from typing import Any

LIBRARIES = (
    *("click", "fsspec", "jinja2.sandbox", "numpy", "pyarrow.compute", "pyarrow.csv"),
    *("pyarrow.json", "pyarrow.parquet", "sqlite3", "tokenizers", "tqdm.auto", "uuid", "zipfile"),
)
PLANNERS = (
    *("psutil", "torch", "transformers.modeling_utils", "transformers.tokenization_utils_fast"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"),
)
_LINUX_OS = """
copy_file_range eventfd fdatasync getrandom getxattr listxattr memfd_create pidfd_open
posix_fadvise posix_fallocate preadv2 removexattr sched_getaffinity sched_setaffinity setns setxattr
splice unshare O_DIRECT O_PATH O_TMPFILE
"""
_POSIX_OS = """
chown ctermid fchdir fchmod fchown fork forkpty fpathconf getegid geteuid getgid getgrouplist
getgroups getloadavg getpgid getpgrp getpriority getresuid getsid getuid killpg lchown lockf major
mkfifo mknod nice openpty pathconf pipe2 posix_spawn pread preadv pwrite pwritev register_at_fork
sched_yield sendfile setegid seteuid setgid setpgid setpriority setsid setuid statvfs fstatvfs sync
sysconf sysconf_names tcgetpgrp ttyname uname wait wait3 wait4 O_CLOEXEC O_DIRECTORY O_NOCTTY
O_NOFOLLOW O_NONBLOCK O_SYNC RTLD_NOLOAD RTLD_GLOBAL ST_NOEXEC WIFEXITED WNOHANG
"""
_POSIX_SIGNALS = """
SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2
alarm pthread_kill pthread_sigmask setitimer siginterrupt sigwait
"""
WITHOUT = {
    "darwin": {
        os: _LINUX_OS,
        signal: "pidfd_send_signal sigtimedwait sigwaitinfo",
        fcntl: "F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW",
        resource: "prlimit",
    },
    "win32": {
        os: _LINUX_OS + _POSIX_OS,
        signal: _POSIX_SIGNALS + "pidfd_send_signal sigtimedwait sigwaitinfo",
    },
}
NO_MODULES = {"darwin": (), "win32": ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty")}
_REAL_READLINK, _REAL_ISDIR = os.readlink, os.path.isdir


def play(system: str) -> None:
    """Take away what a system lacks."""
    for name in LIBRARIES:
        importlib.import_module(name)
    set_lock, statvfs = fcntl.F_OFD_SETLK, os.statvfs
    for module, names in WITHOUT[system].items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    for name in NO_MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    shutil._copyxattr = lambda *_, **__: None  # type: ignore[attr-defined]
    if system == "darwin":
        os.sysconf_names = {k: v for k, v in os.sysconf_names.items() if "AVPHYS" not in k}
    else:
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        shutil.disk_usage = lambda path: _disk_usage(statvfs(path))
        sys.modules["msvcrt"] = _msvcrt(set_lock)
        ctypes.windll = types.SimpleNamespace(  # type: ignore[attr-defined]
            kernel32=types.SimpleNamespace(GlobalMemoryStatusEx=_memory_status)
        )
    sys.addaudithook(_refusing(system))
    sys.platform = system


def _msvcrt(set_lock: int) -> types.ModuleType:
    """Its locks on bytes, from where the file is at."""
    found: Any = types.ModuleType("msvcrt")
    real = fcntl.fcntl

    def locking(handle: int, mode: int, size: int) -> None:
        at = os.lseek(handle, 0, os.SEEK_CUR)
        try:
            real(handle, set_lock, struct.pack("hhqqi0q", 1, os.SEEK_SET, at, size, 0))
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    found.LK_LOCK, found.LK_NBLCK, found.locking = 1, 2, locking
    return found  # type: ignore[no-any-return]


def _disk_usage(found: os.statvfs_result) -> Any:
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return types.SimpleNamespace(total=total, used=total - free, free=free)


def _memory_status(status: Any) -> int:
    length, *_ = struct.unpack_from("=IIQQ", status._obj)
    assert length == ctypes.sizeof(status._obj) == 64
    struct.pack_into("=IQQ", status._obj, 4, 50, 16 << 30, 8 << 30)
    return 1


def _refusing(system: str) -> Any:
    """An audit hook that refuses what the system would."""
    busy = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if busy:
            return
        busy.append(event)
        try:
            refuse(event, arguments)
        finally:
            busy.clear()

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if sys._getframe(2).f_code.co_filename == tempfile.__file__:
            return  # on Windows it does all this in another way
        if event in ("open", "os.listdir", "os.scandir"):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
            if path.startswith(("/proc", "/sys", "/dev/shm")):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if system == "win32" and event == "open" and _REAL_ISDIR(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        elif event in ("os.rename", "os.remove") and system == "win32":
            path = os.path.realpath(arguments[0])
            for handle in os.listdir("/proc/self/fd"):
                try:
                    held = _REAL_READLINK(f"/proc/self/fd/{handle}")
                except OSError:  # the one that lists them
                    continue
                if held == path:
                    raise PermissionError(errno.EACCES, "it is open", path)
        elif event == "ctypes.dlopen" and arguments[0] is None and system == "win32":
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")

    return hook


def main() -> None:
    """Play the system, and run batchrun's command line there; or Python code, after `-c`."""
    system, *arguments = sys.argv[1:]
    if arguments[0] == "plan":
        for name in PLANNERS:
            importlib.import_module(name)
    assert multiprocessing.connection
    play(system)
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
        return
    cli = importlib.import_module("batchrun.cli")
    cli.main(arguments)


if __name__ == "__main__":
    main()
