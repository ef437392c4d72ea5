"""Runs one part of the check as a process, by its clock, and says what came of it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.parts import ROOT, Part, command

STARTUP = 60.0
"""Seconds to import and to make a CUDA context, before a part's own limit begins."""

_MARK = "BATCHRUN_GPU_CHECK"  # in the environment of all that a part starts


def run(
    part: Part,
    args: argparse.Namespace,
    logs: Path,
    *,
    startup: float = STARTUP,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Run one part; returns its record, whatever happened.

    Args:
        part: The part, and its limit.
        args: The check's `toy` and `attention`.
        logs: Folder for its figures and for what it prints.
        startup: Seconds until it must be ready.
        deadline: When it must have ended in any case, by the monotonic clock.
    """
    out, log = logs.resolve() / f"{part.name}.json", logs / f"{part.name}.log"
    out.unlink(missing_ok=True)
    wanted = command(part, args, out)
    began = time.monotonic()
    mark = f"{part.name}-{os.getpid()}-{time.monotonic_ns()}"
    receiver, sender = os.pipe()
    passed = []
    if not part.tests:  # pytest says nothing of being ready: its limit begins at once
        passed = [sender]
        wanted += [f"--ready={sender}", f"--deadline={deadline}"]

    def at_most(seconds: float) -> float:
        return max(0.0, min(seconds, deadline - time.monotonic()))

    with log.open("w") as output:
        process = subprocess.Popen(
            wanted,
            cwd=ROOT,
            env=_environment(mark),
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=passed,
            process_group=0,
        )
        os.close(sender)
        code = None
        try:
            # Readable when the part says that it is ready, and when it has ended.
            ready = bool(select.select([receiver], [], [], at_most(startup))[0])
            start = time.monotonic() - began
            if ready:
                code = process.wait(at_most(part.limit))
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.close(receiver)
            _end(process, mark)
    record = _record(part, out, code, log)
    if code is None:
        what, limit = ("done", part.limit) if ready else ("ready", startup)
        until = " or at the end of the budget" if time.monotonic() >= deadline else ""
        record |= {"status": "timed out", "reason": f"not {what} after {limit:.0f} s{until}"}
    return record | {"start_s": round(start, 1), "seconds": round(time.monotonic() - began, 1)}


def _environment(mark: str) -> dict[str, str]:
    found = {
        **os.environ,
        _MARK: mark,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # What newer libraries warn of must not cost the tests of a lent device.
        "PYTEST_ADDOPTS": "-W default -p no:cacheprovider",
    }
    # Compilers keep what they made there.
    if not os.access(os.path.expanduser("~"), os.W_OK):
        found["HOME"] = tempfile.gettempdir()
    return found


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the part and all that it started: what is left running would slow the next one down."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):  # a job's processes leave the group
        with suppress(OSError):  # others' processes, and those that have ended
            handle = os.pidfd_open(int(entry.parent.name))  # which can't come to mean another
            try:
                if wanted in entry.read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _record(part: Part, out: Path, code: int | None, log: Path) -> dict[str, Any]:
    """What is known of a part that ended with `code`, None for one that was killed."""
    if part.tests:
        record: dict[str, Any] = {"figures": _counts(out.with_suffix(".xml"), log)}
    elif out.exists():
        record = json.loads(out.read_text())
    else:
        record = {"figures": {}}
    if code:
        said = log.read_text(errors="replace").split("\n")
        reason = record.get("reason") or next(filter(None, reversed(said)), "it said nothing")
        return record | {"status": "failed", "reason": f"exit code {code}: {reason}"}
    return {"status": "done"} | record


def _counts(report: Path, log: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped; of an unfinished run what its log shows."""
    if report.exists():
        suite = ElementTree.parse(report).getroot()[0]
        count = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        passed = count["tests"] - failed - count["skipped"]
        return {"passed": passed, "failed": failed, "skipped": count["skipped"]}
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)", log.read_text(errors="replace"))
    return {
        "passed": words.count("PASSED"),
        "failed": words.count("FAILED") + words.count("ERROR"),
        "skipped": words.count("SKIPPED"),
    }
