"""Limits are read where the process is, in the hierarchies that schedulers and containers make.

Each layout is a folder of text as the kernel shows it under that system.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from batchrun import cgroups, machine

MIB = 1 << 20
UNLIMITED_V1 = "9223372036854771712"
V2 = "31 23 0:27 {root} /sys/fs/cgroup rw,nosuid,nodev,noexec - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:3{n} {root} /sys/fs/cgroup/{names} rw,nosuid - cgroup cgroup rw,{names}"
MEMINFO = "MemTotal: 65536000 kB\nMemFree: 1000 kB\nMemAvailable: 60000000 kB\n"


@dataclass(frozen=True)
class Layout:
    """What the kernel shows, and what is to be read out of it: bytes free, and processors."""

    cgroup: str
    mountinfo: str
    files: Mapping[str, str]
    free: int | None
    file: str | None = None
    cpus: float | None = None
    oom_kills: int = 0
    proc: Mapping[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        shown = {
            "proc/self/cgroup": self.cgroup,
            "proc/self/mountinfo": self.mountinfo,
            "proc/meminfo": MEMINFO,
            **{f"proc/{name}": text for name, text in self.proc.items()},
            **{f"sys/fs/cgroup/{name}": text for name, text in self.files.items()},
        }
        for name, text in shown.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")
        return root


def v2(folder: str, limit: object, used: int, *, high: object = "max", cached: int = 0) -> dict:
    at = f"{folder}/" if folder else ""
    return {
        f"{at}memory.max": str(limit),
        f"{at}memory.high": str(high),
        f"{at}memory.current": str(used),
        f"{at}memory.stat": f"anon 1\nfile {2 * cached}\ninactive_file {cached}",
        f"{at}memory.events": "low 0\nhigh 9\nmax 4\noom 1\noom_kill 0\noom_group_kill 0",
    }


def v1(folder: str, limit: object, used: int, *, above: object = UNLIMITED_V1) -> dict:
    return {
        f"memory/{folder}memory.limit_in_bytes": str(limit),
        f"memory/{folder}memory.usage_in_bytes": str(used),
        f"memory/{folder}memory.stat": f"cache 5\nhierarchical_memory_limit {above}\n"
        f"total_inactive_file {MIB}",
        f"memory/{folder}memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0",
    }


SLURM = "system.slice/slurmstepd.scope/job_42"
POD = "kubepods/burstable/pod0c7a6c1e-6d4c-44f0-8dd3-0d3a1b1b2f11/3f1d9c"
LAYOUTS = {
    "systemd: a limit on the user's slice": Layout(
        "0::/user.slice/user-1000.slice/session-3.scope",
        V2.format(root="/"),
        {
            **v2("user.slice", "max", 900 * MIB),
            **v2("user.slice/user-1000.slice", 512 * MIB, 200 * MIB),
            **v2("user.slice/user-1000.slice/session-3.scope", "max", 100 * MIB),
            "user.slice/user-1000.slice/session-3.scope/cpu.max": "max 100000",
            "user.slice/cpu.max": "150000 100000",
        },
        free=312 * MIB,
        file="memory.max",
        cpus=1.5,
    ),
    "systemd-run: MemoryHigh, and a leaf where memory is not counted": Layout(
        "0::/user.slice/run-7.scope/inner",
        V2.format(root="/"),
        {
            **v2("user.slice/run-7.scope", 512 * MIB, 200 * MIB, high=256 * MIB, cached=50 * MIB),
            "user.slice/run-7.scope/inner/cgroup.procs": "1",
        },
        free=(256 - 200 + 50) * MIB,
        file="memory.high",
    ),
    "a group's name ends a line everywhere but in the kernel": Layout(
        "0::/my\r\x1c\u2028slice",
        V2.format(root="/"),
        v2("my\r\x1c\u2028slice", 512 * MIB, 200 * MIB),
        free=312 * MIB,
        file="memory.max",
    ),
    "slurm 22 and newer: the job's limit is above the step's and the task's": Layout(
        f"0::/{SLURM}/step_0/user/task_0",
        V2.format(root="/"),
        {
            **v2(SLURM, 1024 * MIB, 600 * MIB),
            **v2(f"{SLURM}/step_0", 2048 * MIB, 500 * MIB),
            **v2(f"{SLURM}/step_0/user", "max", 400 * MIB),
            **v2(f"{SLURM}/step_0/user/task_0", "max", 400 * MIB),
            f"{SLURM}/step_0/user/task_0/memory.events": "oom 3\noom_kill 2",
            f"{SLURM}/cpu.max": "400000 100000",
        },
        free=424 * MIB,
        file="memory.max",
        cpus=4,
        oom_kills=2,
    ),
    "slurm on version 1": Layout(
        "11:memory:/slurm/uid_1000/job_42/step_0/task_0\n4:cpu,cpuacct:/slurm/uid_1000/job_42\n"
        "1:name=systemd:/system.slice/slurmd.service",
        V1.format(n=1, root="/", names="memory")
        + "\n"
        + V1.format(n=2, root="/", names="cpu,cpuacct"),
        {
            **v1("", UNLIMITED_V1, 9000 * MIB),
            **v1("slurm/uid_1000/job_42/", 700 * MIB, 301 * MIB),
            **v1("slurm/uid_1000/job_42/step_0/", UNLIMITED_V1, 300 * MIB),
            **v1("slurm/uid_1000/job_42/step_0/task_0/", UNLIMITED_V1, 300 * MIB),
            "memory/slurm/uid_1000/job_42/step_0/task_0/memory.oom_control": "oom_kill 5",
            "cpu,cpuacct/slurm/uid_1000/job_42/cpu.cfs_quota_us": "250000",
            "cpu,cpuacct/slurm/uid_1000/job_42/cpu.cfs_period_us": "100000",
            "cpu,cpuacct/slurm/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/slurm/cpu.cfs_period_us": "100000",
        },
        free=400 * MIB,
        file="memory.limit_in_bytes",
        cpus=2.5,
        oom_kills=5,
    ),
    "kubernetes: a namespace whose root is the container": Layout(
        "0::/",
        V2.format(root="/"),
        {**v2("", 256 * MIB, 100 * MIB), "cpu.max": "50000 100000"},
        free=156 * MIB,
        file="memory.max",
        cpus=0.5,
    ),
    "kubernetes on version 1: only the pod has a limit, which the container does not see": Layout(
        f"9:memory:/{POD}\n3:cpu,cpuacct:/{POD}",
        V1.format(n=1, root=f"/{POD}", names="memory"),
        v1("", UNLIMITED_V1, 101 * MIB, above=300 * MIB),
        free=200 * MIB,
        file="memory.stat",
    ),
    "docker on version 2 with the host's namespace": Layout(
        "0::/system.slice/docker-3f1d9c.scope",
        V2.format(root="/system.slice/docker-3f1d9c.scope"),
        v2("", 128 * MIB, 28 * MIB),
        free=100 * MIB,
        file="memory.max",
    ),
    "docker on version 1": Layout(
        "9:memory:/docker/3f1d9c\n3:cpu,cpuacct:/docker/3f1d9c",
        V1.format(n=1, root="/docker/3f1d9c", names="memory"),
        v1("", 128 * MIB, 29 * MIB),
        free=100 * MIB,
        file="memory.limit_in_bytes",
    ),
    "hybrid: memory in version 1, a version 2 beside it": Layout(
        "4:memory:/jobs/a b\n1:cpu:/\n0::/",
        V1.format(n=1, root="/", names="memory")
        + "\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        {**v1("jobs/a b/", 90 * MIB, 11 * MIB), **v2("unified", 1 * MIB, 0)},
        free=80 * MIB,
        file="memory.limit_in_bytes",
    ),
    "a process outside of its namespace's root sees what is mounted": Layout(
        "0::/../other.scope",
        V2.format(root="/../outer"),
        {**v2("", 64 * MIB, 4 * MIB), "../other.scope/memory.max": "1"},
        free=60 * MIB,
        file="memory.max",
    ),
    "the root group, where only the machine counts what it killed": Layout(
        "0::/",
        V2.format(root="/"),
        {},
        free=None,
        oom_kills=3,
        proc={"vmstat": "pgfault 9\noom_kill 3"},
    ),
    "no control groups": Layout("", "", {}, free=None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_limits_are_read_where_the_process_is(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    root = layout.write(tmp_path)
    found = cgroups.memory_limit(root)
    assert (found and found.free) == layout.free
    assert (found and found.file) == layout.file
    assert cgroups.cpu_quota(root) == layout.cpus
    assert cgroups.oom_kills(root) == layout.oom_kills
    assert machine.available_memory(root) == (layout.free or 60_000_000 * 1024)
    assert machine.cores(root) <= max(1, round((layout.cpus or 1e9) + 0.49))


def test_of_the_machine_and_a_group_the_tighter_one_counts(tmp_path: Path) -> None:
    layout = LAYOUTS["docker on version 1"]
    root = layout.write(tmp_path)
    (root / "proc/meminfo").write_text("MemAvailable: 1024 kB\n")
    assert machine.available_memory(root) == MIB


def test_without_proc_the_machine_is_asked_otherwise(tmp_path: Path) -> None:
    assert cgroups.memory_limit(tmp_path) is None
    assert cgroups.oom_kills(tmp_path) == 0
    assert machine.available_memory(tmp_path) > 0
    assert machine.cores(tmp_path) == len(os.sched_getaffinity(0))


def test_a_real_group_of_this_machine_is_found() -> None:
    """Whatever the machine has: the processes that are listed in the folder are ours."""
    _, folders = cgroups._levels("memory", cgroups.ROOT)
    if not folders or not (folders[0] / "cgroup.procs").exists():
        pytest.skip("no hierarchy of control groups is mounted")
    assert str(os.getpid()) in (folders[0] / "cgroup.procs").read_text().split()


def test_a_quota_bounds_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = LAYOUTS["kubernetes: a namespace whose root is the container"].write(tmp_path)
    code = f"""
import os
from pathlib import Path
from batchrun import machine
os.sched_getaffinity = lambda pid: range(64)
machine.use_cores(Path({str(root)!r}))
print(os.environ.get("OMP_NUM_THREADS"))
"""

    def threads() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads() == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # whoever says so has a reason
    assert threads() == "3"
