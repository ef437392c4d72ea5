"""Whether anybody else could have changed files on disk that are run or relied on."""

from __future__ import annotations

import os
import stat
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
            return f"others can write {place}"
        # Nobody else gets past a folder that only its owner may enter.
        mine = found.st_uid == me and stat.S_ISDIR(found.st_mode)
        shut = shut or (mine and not found.st_mode & (stat.S_IXGRP | stat.S_IXOTH))
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
