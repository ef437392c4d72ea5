"""Whether anybody else could have changed files on disk that are run or relied on."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from batchrun import platforms

if not platforms.WINDOWS:
    import grp
    import pwd


def who_else(path: Path) -> str | None:
    """Why somebody other than this user and root could have created or could change a path.

    Args:
        path: An existing file or folder, without links on the way: see `os.path.realpath`.

    Returns:
        One line that names the file or folder; None where nobody could.

    Raises:
        OSError: It can't be inspected.
    """
    if platforms.WINDOWS:  # its lists of who may do what are not read
        return None
    me, shut = os.geteuid(), False
    for place in (*reversed(path.parents), path):
        found = os.lstat(place)
        if found.st_uid not in {0, me}:
            return f"{place} belongs to user {found.st_uid}"
        if not shut and _others_write(found):
            return f"others can write to {place}"
        shut = shut or _shut(found)
    return None


def changed_by_others(folder: Path, names: Iterable[str]) -> str | None:
    """Why somebody other than this user and root could have changed a folder or files in it.

    The folders above it don't count, except where one of them keeps everybody else out. A folder
    with the setgid bit is shared with its group on purpose.

    Args:
        folder: The folder.
        names: Files in it; those that don't exist are passed over.

    Returns:
        One line that names the file or folder; None where nobody could.

    Raises:
        OSError: The folder can't be inspected.
    """
    if platforms.WINDOWS:
        return None
    folder = Path(os.path.realpath(folder))
    shared = bool(folder.stat().st_mode & stat.S_ISGID)
    shut = any(_shut(os.lstat(parent)) for parent in folder.parents)
    for place in (folder, *(folder / name for name in names)):
        try:
            found = place.stat()
        except FileNotFoundError:
            continue
        if not shared and found.st_uid not in {0, os.geteuid()}:
            return f"{place} belongs to user {found.st_uid}"
        if not shut and (found.st_mode & stat.S_IWOTH if shared else _others_write(found)):
            return f"others can write to {place}"
    return None


def others_write(folder: Path) -> bool:
    """Whether others can write a folder that is not shared with a group by its setgid bit."""
    if platforms.WINDOWS:
        return False
    try:
        found = folder.stat()
    except OSError:  # it doesn't exist yet, or may not be inspected
        return False
    if found.st_mode & stat.S_ISGID:
        return bool(found.st_mode & stat.S_IWOTH)
    return _others_write(found)


def _shut(found: os.stat_result) -> bool:
    """Whether it is a folder of this user's, which nobody else gets past."""
    mine = found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode)
    return mine and not found.st_mode & (stat.S_IXGRP | stat.S_IXOTH)


def _others_write(found: os.stat_result) -> bool:
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return False  # others can add names there, but not remove or replace any
    writers = found.st_mode & (stat.S_IWOTH | stat.S_IWGRP)
    return bool(writers & stat.S_IWOTH) or bool(writers and not _is_mine_alone(found.st_gid))


def _is_mine_alone(group: int) -> bool:
    """Whether it is a user's private group, which many systems give to each user."""
    if group == 0:
        return True
    try:
        mine, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == mine and set(found.gr_mem) <= {mine}
