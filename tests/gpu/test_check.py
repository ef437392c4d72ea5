"""`make gpu-check`: rehearsed whole on the CPU, and what it says when parts fail."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import check, details, table
from benchmarks.gpu.check import PARTS, Part
from tests.test_docs import ROOT

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
            "utilisation": 0.97,
        },
    },
    "peer": {
        "status": "done",
        "figures": {"tokens_per_s": 7000.0, "attention": "sdpa", "finished": False},
    },
}


def test_the_rehearsal_runs_every_part_in_under_a_minute(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check", "--toy", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    expected = {part.name: "done" for part in PARTS} | {"sanitizer": "unavailable"}
    assert {name: part["status"] for name, part in result["parts"].items()} == expected
    assert result["toy"] is True
    assert result["versions"]["torch"]
    for row in result["table"]:
        assert row["value"] is not None, row
        assert row["met"] is None, "a rehearsal meets no target"
        assert row["figure"] in done.stdout
    assert all("reason" not in row for row in result["parts"]["layouts"]["figures"]["layouts"])
    for name in ("vmm", "slabs", "layouts"):
        assert f"**{name}**" in done.stdout
    assert time.monotonic() - began < 120


def test_the_parts_limits_add_up_to_less_than_nine_minutes() -> None:
    assert sum(part.limit for part in PARTS) < 9 * 60


def test_a_part_out_of_time_is_killed_and_keeps_its_figures(tmp_path: Path) -> None:
    record = check.run(Part("steps", 0.3, ""), TOY, tmp_path)
    assert record["status"] == "timed out"
    assert record["reason"] == "not done after 0 s"
    assert record["seconds"] < 20
    out, log = tmp_path / "steps.json", tmp_path / "steps.log"
    out.write_text(json.dumps({"status": "unfinished", "figures": {"prefill_s": 2.0}}))
    record = check._record(Part("steps", 9, ""), out, None, log)
    assert record["status"] == "timed out"
    assert record["figures"] == {"prefill_s": 2.0}


def test_a_part_that_crashes_costs_only_its_own_figures(tmp_path: Path) -> None:
    record = check.run(Part("nowhere", 60, ""), TOY, tmp_path)
    assert record["status"] == "failed"
    assert "No module named 'benchmarks.gpu.nowhere'" in record["reason"]
    rows = table.rows(GOOD | {"job": record}, toy=False)
    missing = {row.figure for row in rows if row.value is None}
    assert len(missing) == 5
    assert all("No module" in row.shown for row in rows if row.figure in missing)


def test_unfinished_tests_are_counted_from_their_log(tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    log.write_text("a::b PASSED [ 1%]\na::c FAILED\na::d SKIPPED (no)\na::e PASSED\na::f ")
    record = check._record(Part("tests", 80, ""), tmp_path / "tests.json", None, log)
    assert record["figures"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert record["status"] == "timed out"


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
    assert "\n".join(check.parts_table()) in method


@pytest.mark.skipif(check.cuda_devices() > 0, reason="there is a CUDA device")
def test_without_a_device_one_message_says_what_to_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no CUDA device here")
    assert "--toy" in done.stderr
