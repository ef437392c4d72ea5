from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.peers import compare, keep
from benchmarks.processes import FailedError, Memory, measured

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "benchmarks" / "peers"


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def measured_elsewhere(command: list[str], log: Path, timeout: float) -> str:
    """What is raised when a process that adopts orphans, as the benchmark does, measures it."""
    script = (
        "import sys; from pathlib import Path;"
        "from benchmarks.processes import adopt_orphans, measured; adopt_orphans();"
        f"measured({command!r}, {{}}, Path({str(log)!r}), {timeout})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stderr


def test_a_command_that_is_not_done_in_time_is_ended_with_all_that_it_started(
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    command = python(
        "import os, subprocess",
        "child = subprocess.Popen(['sleep', '600'])",
        "print(os.getpid(), child.pid, flush=True)",
        "child.wait()",
    )
    for timeout in (3, 30, 300):  # until it has come so far before its time is over
        raised = measured_elsewhere(command, log, timeout=timeout)
        said = f"FailedError: not done within {timeout} seconds"
        assert raised.splitlines()[-1].endswith(said)
        if pids := [int(pid) for pid in log.read_text().split()]:
            break
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


def test_what_a_command_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = python("import subprocess", "print(subprocess.Popen(['sleep', '600']).pid)")
    assert not measured_elsewhere(command, log, timeout=600)
    assert not psutil.pid_exists(int(log.read_text()))


def test_a_command_that_fails_tells_its_reason_in_one_line(tmp_path: Path) -> None:
    command = python("print('before'); raise ValueError('no such thing')")
    with pytest.raises(FailedError) as found:
        measured(command, {}, tmp_path / "log")
    assert str(found.value) == "ValueError: no such thing"
    assert found.value.log.startswith("before\nTraceback")


def test_memory_and_seconds_are_those_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of what this process has running beside it."""
    look, seen = Memory._look, tmp_path / "seen"

    def looked(self: Memory) -> None:
        look(self)
        if self.proportional > 200 << 20:
            seen.touch()

    monkeypatch.setattr(Memory, "_look", looked)
    command = python(
        "import os, time",
        "held = b'x' * (200 << 20)",
        f"while not os.path.exists({str(seen)!r}): time.sleep(0.1)",
        "time.sleep(1)",
    )
    waits = python("held = b'x' * (300 << 20)", "print(flush=True)", "input()")
    with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        found = measured(command, {"PYTHONDONTWRITEBYTECODE": "1"}, tmp_path / "log")
        assert other.poll() is None
        other.communicate(b"\n")
    assert found["process_s"] > 1
    assert 200 << 20 < found["peak_memory"] < 400 << 20


def figures(seconds: float) -> dict[str, Any]:
    made: dict[str, Any] = {"seconds": seconds, "completion_tokens": 1200, "process_s": seconds}
    return made | {
        "load_s": 0.0,
        "peak_memory": 1 << 20,
        "peak_resident_sum": 1 << 20,
        "settings": {},
        "versions": {},
    }


def test_a_way_that_fails_or_is_slow_does_not_spoil_the_others(tmp_path: Path) -> None:
    runs = {"batchrun": 0, "broken": 0, "later": 0, "slow": 0}

    def way(name: str, file: Path, folder: Path) -> dict[str, Any]:
        assert file.is_file()
        assert not list(folder.iterdir())
        runs[name] += 1
        if name == "broken" or (name == "later" and runs[name] == 2):
            raise FailedError("out of cheese")
        return figures(50.0 if name == "slow" else 2.0)

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"max_tokens": 6}) + "\n" for _ in range(2)))
    seen: list[str] = []
    result = compare(
        "two",
        file,
        {n: lambda file, folder, n=n: way(n, file, folder) for n in runs},  # type: ignore[misc]
        argparse.Namespace(repeat=3, once_over=10.0),
        lambda so_far: seen.append(json.dumps(so_far)),
    )
    assert runs == {"batchrun": 3, "broken": 1, "later": 2, "slow": 1}
    assert result["failures"] == {"broken": "out of cheese", "later": "out of cheese"}
    assert {name: len(found["seconds"]) for name, found in result["ways"].items()} == {
        "batchrun": 3,
        "later": 1,
        "slow": 1,
    }
    assert result["ratios"]["slow"] == 25
    assert result["completion_tokens"] == 12
    assert len(seen) == 7
    assert list(json.loads(seen[0])["ways"]) == ["batchrun"]


def test_the_line_in_the_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "line.json"
    keep(path, {"a": 1})
    keep(path, {"b": 2})
    assert path.read_text() == '{"b": 2}\n'
    assert os.listdir(tmp_path) == ["line.json"]


@pytest.mark.parametrize(
    ("made", "failing"), [("list(counts)", False), ("[1] * len(counts)", True)]
)
def test_an_adapter_gives_figures_only_when_every_row_has_its_tokens(
    tmp_path: Path, made: str, failing: bool
) -> None:
    closed = tmp_path / "closed"
    adapter = tmp_path / "adapter.py"
    adapter.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ADAPTERS)!r})\n"
        "from measure import main\n"
        "class Peer:\n"
        "    settings = {'kind': 'small'}\n"
        "    def __init__(self, model, device, options): pass\n"
        f"    def run(self, prompts, counts): return {made}\n"
        f"    def close(self): open({str(closed)!r}, 'w')\n"
        "main(Peer, ['psutil'], lambda options: {'engine': options['of']})\n"
    )
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    rows.write_text(json.dumps({"prompt": "the", "max_tokens": 3}) + "\n")
    command = [sys.executable, str(adapter), "--model", "none", "--input", str(rows)]
    command += ["--out", str(out), "--options", '{"of": "7"}']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert closed.exists()
    assert bool(done.returncode) == failing
    if failing:
        assert "1 of 1 rows have not the tokens that they ask for" in done.stderr
        assert not out.exists()
    else:
        found = json.loads(out.read_text())
        assert found["completion_tokens"] == 3
        assert found["versions"] == {"psutil": psutil.__version__, "engine": "7"}
