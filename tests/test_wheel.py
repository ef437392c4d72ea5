"""What users install: a wheel, in an environment of its own, used from a folder of theirs."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from batchrun import DISTRIBUTION
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parent.parent
SOURCES = ("README.md", "LICENSE", "pyproject.toml", "setup.py", "allocator", "batchrun", "jobs")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, or the build would leave its own files in the checkout."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", made, source, cwd=made)
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is installed. What it depends on is this environment's, by its path alone."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    run(*command, cwd=folder)
    theirs = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # A line of a .pth file is a path, and the .pth files found there are not read: no checkout.
    (Path(theirs.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_readme_in_the_wheel_has_no_link_to_a_file_beside_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        [name] = [name for name in packed.namelist() if name.endswith(".dist-info/METADATA")]
        text = packed.read(name).decode()
    assert "Description-Content-Type: text/markdown" in text
    assert "\n# batchrun\n" in text
    assert not re.search(r"\]\((?!https?:)", text)
    described = runpy.run_path(str(ROOT / "setup.py"))["described"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = described(readme, "https://forge/a/b")
    assert "](https://forge/a/b/blob/main/docs/memory.md#" in shown
    assert "](https://forge/a/b/raw/main/docs/recording/batchrun.svg)" in shown
    assert not re.search(r"\]\((?!https?:)", shown)


def test_nothing_but_batchrun_lands_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "batchrun",
        DISTRIBUTION.replace("-", "_"),
    }
    packed = {name for name in names if name.startswith("batchrun/")}
    sources = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("*.py", "*.cpp", "*.h", "*.css", "*.html", "py.typed")
        for folder in ("batchrun", "batchrun/allocator", "batchrun/jobs")
        for path in [*(ROOT / folder).glob(suffix), *(ROOT / folder).glob(f"*/**/{suffix}")]
    }
    assert packed == sources


def test_a_job_runs_from_another_folder(environment: Path, tmp_path: Path) -> None:
    """Whatever lies there: modules of these names would break the job if they were executed."""
    for name in ("allocator", "batchrun", "jobs", "queue", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')\n")
    write_tiny_model(tmp_path / "model")
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    options = ("--model", "model", "--max-tokens", "2", "--output", "out.jsonl")
    command, home = environment / "bin/batchrun", str(tmp_path / "home")
    run(command, "submit", "in.jsonl", *options, cwd=tmp_path, BATCHRUN_HOME=home)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "<!doctype html>" in run(command, "report", "-o", "-", cwd=tmp_path, BATCHRUN_HOME=home)
    assert [(row["prompt"], row["completion_tokens"]) for row in rows] == [("one", 2), ("two", 2)]
    shown = run(command, "stats", "--json", cwd=tmp_path, BATCHRUN_HOME=home)
    assert json.loads(shown)["rows"]["done"] == 2
    where = "import batchrun.jobs.folder as f; print(f.__file__)"
    found = run(environment / "bin/python", "-P", "-c", where, cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment)


def test_the_version_is_the_installed_one(environment: Path, wheel: Path, tmp_path: Path) -> None:
    shown = run(environment / "bin/batchrun", "--version", cwd=tmp_path)
    assert shown.split() == ["batchrun", wheel.name.split("-")[1]]
