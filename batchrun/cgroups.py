"""How much memory and processor time this process's control groups allow.

Slurm, Kubernetes, systemd and Docker set limits at any level of a hierarchy, which may be of
version 1, version 2, or of both at once; a container may see only the lower part of it. All levels
that can be seen count, and the tightest wins (the kernel's admin-guide/cgroup-v1/memory.rst and
admin-guide/cgroup-v2.rst, proc_pid_mountinfo(5)).

Each function takes the folder that holds `proc` and `sys`, which is `/` but for tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

ROOT = Path("/")
# By version: usage, the part of it in files that nobody has used lately, and the limits; beyond
# `high` everything waits for pages.
_MEMORY = {
    1: ("memory.usage_in_bytes", "total_inactive_file", ("memory.limit_in_bytes",)),
    2: ("memory.current", "inactive_file", ("memory.max", "memory.high")),
}
_NONE = 1 << 60  # bytes: version 1 shows no limit as the largest number of pages


@dataclass(frozen=True)
class MemoryLimit:
    """The level of the hierarchy that leaves the least memory.

    Args:
        folder: Where the kernel shows it.
        file: The file there that holds the limit.
        limit: Bytes that it and all levels below may use.
        used: Bytes that they use, without cached files that nobody has used lately, which the
            kernel can reclaim.
    """

    folder: Path
    file: str
    limit: int
    used: int

    @property
    def free(self) -> int:
        """Bytes; below 0 if the limit was lowered below what is used."""
        return self.limit - self.used


def memory_limit(root: Path = ROOT) -> MemoryLimit | None:
    """The limit that leaves the least memory; None if there is none."""
    version, folders = _levels("memory", root)
    found = [limit for folder in folders for limit in _memory_limits(folder, version)]
    return min(found, key=lambda limit: limit.free, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processor time allowed per second, in seconds; None if unlimited."""
    version, folders = _levels("cpu", root)
    found = []
    for folder in folders:
        if version == 1:
            quota = _number(folder / "cpu.cfs_quota_us")
            period = _number(folder / "cpu.cfs_period_us")
        else:  # for example `200000 100000`, or `max 100000`
            given, _, each = text_of(folder / "cpu.max").partition(" ")
            quota, period = (int(w) if w.strip().isdigit() else None for w in (given, each))
        if quota and period and quota > 0:
            found.append(quota / period)
    return min(found, default=None)


def oom_kills(root: Path = ROOT) -> int:
    """How many processes the system has killed because memory ran out.

    Counts this process's group; the whole machine if the group's count is unknown.
    """
    version, folders = _levels("memory", root)
    name = "memory.oom_control" if version == 1 else "memory.events"
    own = folders[0] / name if folders else root
    counts = _counts(own) or _counts(root / "proc/vmstat")
    return counts.get("oom_kill", 0)


def _memory_limits(folder: Path, version: int) -> Iterator[MemoryLimit]:
    current, idle, files = _MEMORY[version]
    used, stat = _number(folder / current), _counts(folder / "memory.stat")
    if used is None:
        return
    limits = {file: _number(folder / file) for file in files}
    # This includes the levels above, which a container can't see; their usage it can't see either.
    # Only version 1 has this.
    limits["memory.stat"] = stat.get("hierarchical_memory_limit")
    for file, limit in limits.items():
        if limit is not None and limit < _NONE:
            yield MemoryLimit(folder, file, limit, used - stat.get(idle, 0))


def _levels(controller: str, root: Path) -> tuple[int, list[Path]]:
    """The version of the controller's hierarchy, and this process's folders in it, bottom up."""
    version, group = 2, None
    for line in lines_of(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            version, group = 1, PurePath(path)
            break
        if number == "0" and not names:
            group = PurePath(path)
    if group is None:
        return version, []
    mounts = list(_mounts(controller if version == 1 else None, root))
    for top, mounted in mounts:
        if group.is_relative_to(top) and ".." not in group.parts:
            below = group.relative_to(top)
            return version, [mounted / part for part in (below, *below.parents)]
    # A namespace, or a mount of another part, hides the way there: use what can be seen.
    return version, [mounted for _, mounted in mounts[:1]]


def _mounts(controller: str | None, root: Path) -> Iterator[tuple[str, Path]]:
    """Which part of the hierarchy is mounted, and where; without a controller, of version 2."""
    for line in lines_of(root / "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        wanted = (
            kind == "cgroup2"
            if controller is None
            else kind == "cgroup" and controller in options.split(" ")[-1].split(",")
        )
        if wanted:
            _, _, _, top, mounted, *_ = fields.split(" ")
            yield _unescaped(top), root / _unescaped(mounted).lstrip("/")


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _counts(path: Path) -> dict[str, int]:
    """The values of a file whose lines are a name and a number."""
    pairs = (line.split() for line in lines_of(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    """A file's number; None if the file is missing, or says `max`."""
    text = text_of(path).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def text_of(path: Path) -> str:
    """A file's text, character by character; empty if it can't be read."""
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def lines_of(path: Path) -> list[str]:
    """A kernel file's lines; of what ends a line, names in them may hold all but a newline."""
    return text_of(path).removesuffix("\n").split("\n")
