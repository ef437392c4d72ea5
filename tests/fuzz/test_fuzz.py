"""Files that once went wrong, and mutants of every kind; `python -m tests.fuzz` tries many."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import all_targets
from tests.fuzz.trial import Target, Wrong, attempt, mutants

CORPUS = Path(__file__).parent / "corpus"
TARGETS = all_targets()


def kept(target: Target) -> list[tuple[str, bytes]]:
    """What once went wrong: named as the seed that it was made of, then anything."""
    files = sorted((CORPUS / target.name).glob("*"))
    return [(file.name.partition("-")[0], file.read_bytes()) for file in files]


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_went_wrong_stays_right(name: str) -> None:
    report = attempt(TARGETS[name], kept(TARGETS[name]))
    assert not report.escaped


@pytest.mark.parametrize("name", TARGETS)
def test_sound_files_are_right(name: str, tmp_path: Path) -> None:
    report = attempt(TARGETS[name], sorted(TARGETS[name].seeds(tmp_path).items()))
    assert set(report.outcomes) == {"right"}, report


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_right_or_refused(name: str) -> None:
    report = attempt(TARGETS[name], mutants(TARGETS[name], TARGETS[name].quick, seed=1))
    assert not report.escaped


def test_every_kept_file_is_of_a_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir() if folder.is_dir()} <= set(TARGETS)


# --- the trial itself ----------------------------------------------------------------------------


def eat() -> None:
    held = []
    while True:
        held.append(bytearray(b"x" * (8 << 20)))


def spin() -> None:
    while True:
        pass


def wrong() -> None:
    raise Wrong("another answer")


def refuse(text: str) -> None:
    raise LookupError(text)


WAYS = {
    "abort": (os.abort, "ends in SIGABRT"),
    "exit": (lambda: os._exit(3), "ends in exit 3"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "ends in SIGKILL"),
    "spin": (spin, "hangs"),
    "eat": (eat, "takes more than 64 MiB"),
    "bug": (lambda: 1 // 0, "raises ZeroDivisionError"),
    "wrong": (wrong, "is wrong: another answer"),
    "mute": (lambda: refuse(" "), "is refused with no word"),
    "exit of python": (lambda: sys.exit(1), "raises SystemExit"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_trial_sees_every_way_to_escape(way: str) -> None:
    act, says = WAYS[way]

    def check(name: str, data: bytes, scratch: Path) -> str:
        if data == b"refuse":
            refuse("a reason")
        if data == b"escape":
            act()
        return "rows"

    target = Target("any", lambda _: {}, check, (LookupError,), memory=64 << 20)
    files = [("seed", data) for data in (b"fine", b"refuse", b"escape", b"fine", b"refuse")]
    report = attempt(target, files, cpu_s=0.3)
    assert report.outcomes == {"right": 2, "refused": 2, "escaped": 1}
    [(_, how, data)] = report.escaped
    assert data == b"escape"
    assert how.startswith(says), how
