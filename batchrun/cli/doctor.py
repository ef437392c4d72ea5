"""`batchrun doctor`: what this machine has, and what batchrun can do with it."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from batchrun import DISTRIBUTION, cgroups, machine
from batchrun.allocator.host import HostMemory
from batchrun.allocator.system import SHARED_MEMORY, max_map_count
from batchrun.allocator.vmm import AllocatorError
from batchrun.cli.inspect import json_option, print_fields
from batchrun.cli.progress import waited
from batchrun.engine.attention import NAMES
from batchrun.errors import UserError
from batchrun.jobs.errors import LOCAL_DISK
from batchrun.jobs.files import fsync_directory
from batchrun.jobs.folder import home
from batchrun.jobs.holders import lock
from batchrun.jobs.journal.schema import create
from batchrun.models.resolve import DEFAULT_MODEL, EMBEDDED_INSTALL, embedded_gguf
from batchrun.platforms import LINUX, NAME, flock
from batchrun.report.text import size
from batchrun.terminal import say_json
from batchrun.trust import others_write

if LINUX:
    import resource

# transformers model types whose tokens the tests compare with `generate`. Others are tried by the
# engine's gates when a job starts, and refused if they would be wrong.
_TESTED = """
codegen deepseek_v3 falcon gemma gemma2 gemma3_text gpt_neo gpt_neox gpt_oss gptj granite llama
llama4_text mistral mixtral nemotron olmo2 phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3
stablelm starcoder2
"""
TESTED = tuple(_TESTED.split())
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "gguf")
_CUDA_PACKAGES = ("cuda-bindings", "flashinfer-python")  # what a GPU needs, and what it may use
_DRIVER = Path("/proc/driver/nvidia/version")

_ADDRESSES = 48 << 30  # bytes that the default model's KV memory reserves on a CPU, about
_PAGE = 256 << 10
_FILES = 64  # descriptors that a run has open at once, about
_MAP_COUNT = 65530  # Linux's default, for which the memory layout is designed

# Name of the limit, what it bounds, and what to type where that is in bytes.
_LIMITS = (
    ("RLIMIT_AS", "addresses", "ulimit -v unlimited"),
    ("RLIMIT_DATA", "private memory", "ulimit -d unlimited"),
    ("RLIMIT_FSIZE", "size of a file, and of KV memory", "ulimit -f unlimited"),
    ("RLIMIT_NOFILE", "open files", None),
    ("RLIMIT_NPROC", "processes and threads", None),
)


@click.command()
@json_option
def doctor_command(as_json: bool) -> int:
    """Show what this machine can do: versions, memory, devices, and problems.

    Runs each attention kernel on a small case and compares it with float32. For each kind of
    attention, shows what `--attention auto` chooses: a kernel, or SDPA, which is slow.

    Exits with 1 if a problem would keep a job from running.
    """
    found = waited("checking this machine", lambda *_: examine())
    if as_json:
        say_json(found)
    else:
        print_fields({name.replace("_", " "): _shown(name, value) for name, value in found.items()})
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Examines the machine, and tries what may be forbidden. Memory in bytes; leaves nothing."""
    folder = home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    versions = {name: _version(name) for name in _PACKAGES}
    here = {
        "batchrun": _version(DISTRIBUTION),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions,
        "cpu_cores": machine.cores(),
        "memory": machine.memory(),
        "home": str(folder),
        "home_free": shutil.disk_usage(existing).free,
    }
    if not LINUX:  # what follows tries what computing takes
        return {**here, "problems": [f"running a model needs Linux; this is {NAME}"]}
    problems = []
    try:
        problems += lacks(existing)
    except OSError:
        problems.append(f"{existing} is not writable; set BATCHRUN_HOME to a writable folder")
    problems += lacking()
    problems += [f"{name} is not installed" for name, found in versions.items() if not found]
    versions |= {name: _version(name) for name in _CUDA_PACKAGES}
    embedded = embedded_gguf()
    attention, of_models = _attention()
    return {
        **here,
        "packages": versions,
        "limits": {**limits(), **fallbacks()},
        "devices": _devices(),
        "attention": attention,
        "attention_of_models": of_models,
        "home_private": f"no, others can write to it: chmod go-w '{folder}'"
        if others_write(folder)
        else "yes",
        "default_model": f"{DEFAULT_MODEL}, "
        + (
            f"embedded: {embedded}" if embedded else f"from the hub; without it: {EMBEDDED_INSTALL}"
        ),
        "tested_architectures": list(TESTED),
        "problems": problems,
    }


def _shown(name: str, value: Any) -> Any:
    if name == "home_free":
        return size(value)
    if isinstance(value, dict):
        return {
            key: size(item) if isinstance(item, int) else item or "not installed"
            for key, item in value.items()
        }
    if name == "batchrun" and value is None:
        return "not installed: a source checkout"
    return ", ".join(value) if name == "tested_architectures" else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch  # noqa: PLC0415  (slow to import)

    names = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"cuda:{index} {properties.name}, {size(free)} free of {size(total)}")
    if _DRIVER.exists():
        names.append(_DRIVER.read_text().splitlines()[0])
    return names


def _attention() -> tuple[dict[str, str], dict[str, str]]:
    """How each kernel library does on a small case on the best device, and what each model gets.

    Returns:
        By library, and by kind of attention.
    """
    import torch  # noqa: PLC0415  (slow to import)

    from batchrun.engine.model.judge import (  # noqa: PLC0415  (needs torch)
        check_kernel,
        check_kinds,
    )

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.float32
    if cuda or machine.multiplies_bfloat16():
        dtype = torch.bfloat16
    found = {name: check_kernel(name, device, dtype) for name in NAMES}
    return (
        {name: f"{'works' if works else 'no'}: {what}" for name, (works, what) in found.items()},
        {
            kind: f"{'fast' if fast else 'works, slowly'}: {what}"
            for kind, (fast, what) in check_kinds(device, dtype).items()
        },
    )


def limits(root: Path = cgroups.ROOT) -> dict[str, str]:
    """Limits on this process, apart from the machine's own, and how to lift them."""
    found = {}
    group = cgroups.memory_limit(root)
    if group is not None:
        found["memory"] = (
            f"{size(group.limit)}, of which {size(max(0, group.free))} is free: "
            f"{group.folder / group.file}"
        )
    quota = cgroups.cpu_quota(root)
    if quota is not None:
        found["processors"] = f"{quota:g} (quota of a control group)"
    for name, what, cure in _LIMITS:
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            found[what] = f"{limit:,}" if cure is None else f"{size(limit)} ({cure})"
    found["mappings"] = f"{max_map_count():,} (vm.max_map_count)"
    if cgroups.text_of(root / "proc/sys/vm/overcommit_memory").strip() == "2":
        found["overcommit"] = "disabled (sysctl -w vm.overcommit_memory=0)"
    return found


def lacking() -> Iterator[str]:
    """What would keep a job from running, and what to do about it; tries each for real."""
    threads = machine.cores() + machine.OWN_THREADS
    if (found := machine.startable_threads(threads)) < threads:
        yield f"only {found} of {threads} threads can start; {machine.THREADS_HINT}"
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < _FILES:
        yield f"only {files} files can be open at once; raise that: ulimit -n 4096"
    if max_map_count() < _MAP_COUNT:
        yield (
            f"a process can have only {max_map_count():,} memory mappings; "
            f"raise that: sysctl -w vm.max_map_count={_MAP_COUNT}"
        )
    if (free := machine.available_memory()) < _ADDRESSES >> 6:
        yield f"only {size(max(0, free))} of memory is free; free some, or raise the limit"
    try:
        with closing(HostMemory(_PAGE, guard=False)) as memory:
            address = memory.reserve(_ADDRESSES)
            memory.map(address, memory.create(1))
    except (AllocatorError, OSError) as error:
        yield f"KV memory on a CPU: {error}"


def fallbacks() -> dict[str, str]:
    """What works differently here, because something is forbidden."""
    try:
        os.close(os.memfd_create("batchrun-doctor"))
    except OSError as error:
        free = os.statvfs(SHARED_MEMORY) if os.path.exists(SHARED_MEMORY) else None
        room = f", {size(free.f_bavail * free.f_frsize)} of it free" if free else ""
        return {
            "memfd_create": f"{error.strerror}: KV memory is a file in {SHARED_MEMORY}{room} "
            "(docker run --shm-size, or allow memfd_create in the seccomp profile)"
        }
    return {}


def lacks(folder: Path) -> list[str]:
    """What a folder's file system lacks for jobs, and what to do; leaves nothing there.

    Raises:
        OSError: The folder can't be written.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix=".batchrun-doctor-", dir=folder) as name:
        for what, tried in _TRIALS.items():
            try:
                tried(Path(name))
            except (OSError, UserError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                found.append(
                    f"{folder}: its file system does not support {what} ({why}); {LOCAL_DISK}"
                )
    return found


def _lock(folder: Path) -> None:
    with (folder / "lock").open("w") as file:
        lock(file)
    with (folder / "lock").open("w") as file:
        flock(file, wait=False)


def _link(folder: Path) -> None:
    with suppress(FileExistsError):
        (folder / "file").touch(exist_ok=False)
    os.link(folder / "file", folder / "link")


_TRIALS: dict[str, Callable[[Path], None]] = {
    "locks": _lock,
    "hard links": _link,
    "fsync of folders": fsync_directory,
    "memory shared by processes, which SQLite's log needs": create,
}
