"""The recipes of examples/scale can be run, and say what the command line knows."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from batchrun.cli.run import resume_command, submit_command
from tests.tiny import write_tiny_model

SCALE = Path(__file__).parent.parent.parent / "examples" / "scale"
RECIPES = sorted(p for p in SCALE.iterdir() if p.suffix in {".sh", ".sbatch", ".yaml"})


def test_there_are_three() -> None:
    assert [p.name for p in RECIPES] == ["by-hand.sh", "rayjob.yaml", "slurm.sbatch"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_option_is_one_of_the_command(recipe: Path) -> None:
    text = re.sub(r"#.*|\\\n", " ", recipe.read_text())
    text = re.sub(r"\n\s+(?=--)", " ", text)  # an array goes on
    known = {
        "submit": {name for p in submit_command.params for name in (*p.opts, *p.secondary_opts)},
        "resume": {name for p in resume_command.params for name in (*p.opts, *p.secondary_opts)},
    }
    found = re.findall(r"batchrun (submit|resume)\b([^\n;)]*)", text)
    assert {command for command, _ in found} == {"submit", "resume"}
    for command, rest in found:
        assert set(re.findall(r"--[a-z][a-z-]+", rest)) <= known[command]
    if recipe.suffix == ".yaml":
        assert all(yaml.safe_load_all(recipe.read_text()))
    else:
        subprocess.run(["bash", "-n", str(recipe)], check=True)


@pytest.mark.long
def test_by_hand_runs_on_this_machine_alone(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    model = write_tiny_model(tmp_path / "tiny")
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "row {i}"}}\n' for i in range(40)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BIN": str(Path(sys.executable).parent),
        "BATCHRUN_HOME": str(tmp_path / "home"),
        "PORT": str(port),
        "WORKERS": "2",
        "GPUS_PER_WORKER": "0",
        "INPUT": str(tmp_path / "in.jsonl"),
        "OUTPUT": str(tmp_path / "out.jsonl"),
    }
    done = subprocess.run(
        [str(SCALE / "by-hand.sh"), "--", "--model", str(model), "--max-tokens", "4"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "40 of 40 rows" in done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 40
