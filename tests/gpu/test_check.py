"""`make gpu-check`: rehearsed whole on the CPU, and what it says when parts fail."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import check, details, needs, outcome, runner, table
from benchmarks.gpu.parts import PARTS, Part, most_seconds, parts_table
from tests.test_docs import ROOT

CHECK = [sys.executable, "-m", "benchmarks.gpu.check"]
TOY = argparse.Namespace(toy=True, attention="auto")
GOOD: dict[str, dict[str, Any]] = {
    "ceilings": {"status": "done", "figures": {"bandwidth": 4e12, "matrix": 8e14}},
    "steps": {
        "status": "done",
        "figures": {
            "decode_bytes": 4e10,
            "decode_step_s": 0.011,
            "decode_device_s": 0.0109,
            "decode_sequences": 256,
            "decode_context": 1024.0,
            "decode_idle": 0.01,
            "prefill_ops": 8e14,
            "prefill_s": 2.0,
            "prefill_tokens": 131072,
        },
    },
    "job": {
        "status": "done",
        "figures": {
            "load": {
                "shape": "qwen3-0.6b",
                "requests": 256,
                "shortest": 100,
                "longest": 1024,
                "seed": 0,
                "max_num_seqs": 256,
                "max_num_batched_tokens": 8192,
            },
            "seconds": 5.0,
            "tokens": 140000,
            "tokens_per_s": 28000.0,
            "steps": 1100,
            "hidden": 0.03,
            "stalls": 4,
            "idle": 0.01,
            "exposed": 0.001,
            "exposed_without_overlap": 0.02,
            "hidden_without_overlap": 0.0,
            "idle_without_overlap": 0.05,
            "tokens_per_s_without_overlap": 25000.0,
            "utilisation": 0.97,
        },
    },
    "peer": {
        "status": "done",
        "figures": {"tokens_per_s": 7000.0, "attention": "sdpa", "finished": False},
    },
}


def rehearse(tmp_path: Path, *options: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The JSON and the output of a check at toy sizes."""
    out = tmp_path / "check.json"
    done = subprocess.run(
        [*CHECK, "--toy", f"--out={out}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {name: part["status"] for name, part in result["parts"].items()}


@pytest.mark.long
def test_the_rehearsal_runs_every_part(tmp_path: Path) -> None:
    result, said = rehearse(tmp_path)
    missing = {"sanitizer": "unavailable", "vllm": "unavailable"}
    expected = {part.name: "done" for part in PARTS} | missing
    assert statuses(result) == expected
    assert result["toy"] is True
    assert result["versions"]["torch"]
    for row in result["table"]:
        assert row["value"] is not None, row
        assert row["met"] is None, "a rehearsal meets no target"
        assert row["figure"] in said
    assert all("reason" not in row for row in result["parts"]["layouts"]["figures"]["layouts"])
    submitted = result["parts"]["submit"]["figures"]
    assert submitted["device"] == "cpu"
    assert submitted["answers_in_whole"] == submitted["answers_in_killed"] == submitted["rows"]
    assert submitted["answers_in_fleet"] == submitted["rows"]
    assert submitted["same_completions_fleet"] == 1
    assert 0 < submitted["rows_at_kill"] < submitted["rows"]
    assert submitted["same_completions"] > 0.9
    assert result["parts"]["pressure"]["figures"]["preemptions"] > 0
    compared = result["parts"]["deterministic"]["figures"]["steps"]
    assert [row["deterministic"] for row in compared] == [False, True]
    for name in ("submit", "pressure", "deterministic", "vmm", "slabs", "layouts"):
        assert f"**{name}**" in said


def test_time_that_is_left_goes_to_parts_that_end_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}

    def run(part: Part, *_: Any, **__: Any) -> dict[str, Any]:
        given[part.name] = part.limit
        return {"status": "done", "figures": {}, "start_s": 5.0, "seconds": 15.0}

    monkeypatch.setattr(runner, "run", run)
    tests = ("tests/gpu",)
    parts = [
        Part("one", 30, ""),
        Part("two", 30, "", tests, beside=True),
        Part("three", 50, "", tests, beside=True),
        Part("four", 30, "", greedy=True),
        Part("five", 30, ""),
    ]
    assert most_seconds(parts) == 30 + 50 + 30 + 30
    done = check.run_all(parts, TOY, tmp_path, {}, deadline=math.inf, keep=lambda _: None)
    assert done == ["one", "two", "three", "four", "five"]
    assert given == {"one": 30, "two": 50, "three": 70, "four": 30, "five": 30 + 40 + 20}


def test_the_clock_of_a_part_begins_when_it_is_ready(tmp_path: Path) -> None:
    record = runner.run(Part("steps", 0.3, ""), TOY, tmp_path)
    assert record["status"] == "timed out"
    assert record["reason"] == "not done after 0 s"
    assert record["start_s"] > 0.3, "torch alone takes longer to import"
    assert record["seconds"] >= record["start_s"] + 0.3
    record = runner.run(Part("steps", 60, ""), TOY, tmp_path, startup=0.1)
    assert record["status"] == "timed out"
    assert record["reason"] == "not ready after 0 s"


def test_nothing_outlives_the_end_of_the_budget(tmp_path: Path) -> None:
    deadline = time.monotonic() + 0.2
    record = runner.run(Part("steps", 60, ""), TOY, tmp_path, deadline=deadline)
    assert record["status"] == "timed out"
    assert record["reason"] == "not ready after 60 s or at the end of the budget"


def test_a_part_out_of_time_keeps_its_figures(tmp_path: Path) -> None:
    out, log = tmp_path / "steps.json", tmp_path / "steps.log"
    out.write_text(json.dumps({"status": "unfinished", "figures": {"prefill_s": 2.0}}))
    record = runner._record(Part("steps", 9, ""), out, None, log)
    assert record["figures"] == {"prefill_s": 2.0}


def test_a_part_that_crashes_costs_only_its_own_figures(tmp_path: Path) -> None:
    record = runner.run(Part("nowhere", 60, ""), TOY, tmp_path)
    assert record["status"] == "failed"
    assert "No module named 'benchmarks.gpu.nowhere'" in record["reason"]
    rows = table.rows(GOOD | {"job": record}, toy=False)
    missing = {row.figure for row in rows if row.value is None}
    assert len(missing) == 5
    assert all("No module" in row.shown for row in rows if row.figure in missing)


def test_what_a_part_started_ends_with_it_wherever_it_went(tmp_path: Path) -> None:
    script = "import sys; print(flush=True); sys.stdin.read()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, runner._MARK: "steps-1"},
            process_group=0,
        ) as left,
        subprocess.Popen(["true"], process_group=0) as part,
    ):
        assert left.stdout is not None
        assert left.stdout.readline() == b"\n"
        runner._end(part, "steps-1")
        assert left.wait() == -signal.SIGKILL


def test_a_killed_check_leaves_the_parts_that_were_done(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    with subprocess.Popen(
        [*CHECK, "--toy", "--only=ceilings,steps", f"--out={out}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ceilings   done"):
                break
        process.kill()
    result = json.loads(out.read_text())
    assert statuses(result)["ceilings"] == "done"
    assert result["parts"]["ceilings"]["figures"]["bandwidth"] > 0
    with tarfile.open(outcome.archive_of(out)) as archive:
        assert {"logs/ceilings.log", "logs/ceilings.json"} <= set(archive.getnames())


def test_parts_that_do_not_fit_the_budget_are_skipped(tmp_path: Path) -> None:
    result, said = rehearse(tmp_path, "--only=ceilings,steps", "--budget=900")
    assert statuses(result) == {"ceilings": "done", "steps": "skipped"}
    reason = result["parts"]["steps"]["reason"]
    assert re.fullmatch(r"its 1200 s do not fit into the \d+ s left", reason)
    assert reason in said


def test_a_check_goes_on_where_an_earlier_one_ended(tmp_path: Path) -> None:
    first, _ = rehearse(tmp_path, "--only=ceilings,steps", "--budget=900", "--commit=a")
    go_on = ["--only=ceilings,vmm", f"--continue={tmp_path / 'check.json'}"]
    second, said = rehearse(tmp_path, *go_on, "--commit=a")
    assert "ceilings   done before" in said
    assert statuses(second) == {"ceilings": "done", "steps": "skipped", "vmm": "done"}
    assert second["parts"]["ceilings"] == first["parts"]["ceilings"]
    assert second["command"].startswith(f"{first['command']} && ")
    third, said = rehearse(tmp_path, *go_on, "--commit=b")
    assert "check.json is of commit a, and this is b" in said
    assert statuses(third) == {"ceilings": "done", "vmm": "done"}
    assert third["parts"]["ceilings"] != first["parts"]["ceilings"]


def test_figures_of_unknown_programs_and_other_devices_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    path.write_text(json.dumps({"commit": "unknown", "device": {"name": "H100"}}))
    assert outcome.earlier_check(path, "unknown", "H100")[0] == {}
    path.write_text(json.dumps({"commit": "a", "device": {"name": "H100"}}))
    assert outcome.earlier_check(path, "a", "H200") == ({}, f"{path} is of H100, and this is H200")
    assert outcome.earlier_check(path, "a", "H100")[1] is None


def test_unfinished_tests_are_counted_from_their_log(tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    log.write_text("a::b PASSED [ 1%]\na::c FAILED\na::d SKIPPED (no)\na::e PASSED\na::f ")
    part = Part("tests", 80, "", ("tests/gpu",))
    record = runner._record(part, tmp_path / "tests.json", None, log)
    assert record["figures"] == {"passed": 2, "failed": 1, "skipped": 1}


def test_figures_are_judged_by_their_targets() -> None:
    rows = {row.figure: row for row in table.rows(GOOD, toy=False)}
    judged = {figure: (row.value, row.met) for figure, row in rows.items()}
    assert judged.pop("end to end, of the roofline")[1] is True
    assert judged == {
        "decode step: (weights + KV) / bandwidth, over its time": (
            pytest.approx(0.909, 1e-2),
            True,
        ),
        "prefill: operations / matrix rate, over its time": (0.5, False),
        "GPU idle between steps, steady decode": (0.01, True),
        "exposed mapping, whole job": (0.001, True),
        "the same without overlap": (0.02, None),
        "live / mapped KV, averaged over time": (0.97, True),
        "end to end, times generate_batch": (4.0, True),
    }
    assert (
        "theirs with sdpa, stopped before its end" in rows["end to end, times generate_batch"].shown
    )
    text = "\n".join(table.text(list(rows.values())))
    assert text.count("MISSED") == 1
    assert text.count("  met") == 6


def test_a_peer_that_is_seldom_there_has_a_row_only_where_it_is() -> None:
    vllm = {"status": "done", "figures": {"tokens_per_s": 14000.0}}
    rows = {row.figure: row for row in table.rows(GOOD | {"vllm": vllm}, toy=False)}
    assert rows["end to end, times vLLM"].value == 2.0
    assert rows["end to end, times vLLM"].met is None


def test_without_ceilings_no_ratio_is_made_up() -> None:
    rows = table.rows({k: v for k, v in GOOD.items() if k != "ceilings"}, toy=False)
    missing = [row for row in rows if row.value is None]
    assert len(missing) == 3
    assert all(row.shown == "none: ceilings was not run" for row in missing)


def test_a_part_of_the_figures_still_makes_its_table() -> None:
    assert list(details.sections({"vmm": {"figures": {"granularity": 2 << 20}}}))
    assert list(details.sections({"steps": {"figures": {}}})) == []
    assert list(details.sections(GOOD))


def test_the_pages_name_the_targets_and_the_parts_as_they_are() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    shown = re.findall(r"at (?:least|most) ([\d.]+)(%?)x?", page.split("## Targets")[1])
    targets = sorted(float(n) / (100 if percent else 1) for n, percent in shown)
    wanted = [row.target for row in table.rows({}, toy=False) if row.target]
    numbers = [float(t.split()[2].rstrip("%")) / (100 if "%" in t else 1) for t in wanted]
    assert targets == sorted(numbers)
    method = (ROOT / "benchmarks" / "METHOD.md").read_text(encoding="utf-8")
    assert "\n".join(parts_table()) in method
    total = most_seconds(PARTS)
    assert f"({total:.0f} s at most" in method
    assert total - 150 < 15 * 60, "without vLLM"


def test_every_test_for_a_gpu_is_in_a_part() -> None:
    parts = [name for part in PARTS for name in part.tests if name.startswith("tests/")]
    for path in (ROOT / "tests").rglob("test_*.py"):
        name = path.relative_to(ROOT)
        if re.search(r"mark\.gpu\b|gpu\.conftest import", path.read_text(encoding="utf-8")):
            assert any(name.is_relative_to(part) for part in parts), name


def test_a_python_without_the_packages_is_told_which() -> None:
    """As a machine has it on which nothing can be installed."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu.check"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "has no click, jinja2, numpy, " in done.stderr
    assert "torch" in done.stderr


def test_ready_kernels_are_found_behind_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    kernels, package = tmp_path / "kernels" / "prefill", tmp_path / "flashinfer"
    (package / "data" / "aot").mkdir(parents=True)
    (package / "__init__.py").touch()
    assert any("are not compiled" in note for note in needs.notes())
    kernels.mkdir(parents=True)
    (kernels / "prefill.so").touch()
    (package / "data" / "aot" / "prefill").symlink_to(kernels)
    assert not any("flashinfer" in note.lower() for note in needs.notes())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_driver_without_a_device_of_torchs_is_said_part_by_part(
    tmp_path: Path, fake_cuda: Path
) -> None:
    out = tmp_path / "check.json"
    done = subprocess.run(
        [*CHECK, "--only=ceilings,vmm,vllm", f"--out={out}"],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(fake_cuda)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "note: vllm is not installed: nothing is compared with it" in done.stdout
    result = json.loads(out.read_text())
    assert set(statuses(result).values()) == {"unavailable"}
    assert "finds no CUDA device" in result["parts"]["vmm"]["reason"]


@pytest.mark.skipif(check.cuda_device() is not None, reason="there is a CUDA device")
def test_without_a_device_one_message_says_what_to_do() -> None:
    done = subprocess.run(
        CHECK,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no CUDA device here")
    assert "--toy" in done.stderr
