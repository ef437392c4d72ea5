"""The real command in a process of its own, in a home of its own, with a tiny real model."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.folder import create
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.models.resolve import fingerprint
from tests.cli.gate import Gate
from tests.cli.warm import Warm
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parent.parent.parent
_PR_CAPBSET_DROP, _DAC_OVERRIDE, _DAC_READ_SEARCH = 24, 1, 2


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The `error:` line, of which there is exactly one, without a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("error: ")

    @property
    def hint(self) -> str:
        lines = [line for line in self.err.splitlines() if line.startswith("hint: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("hint: ")


def obey_permissions() -> None:
    """Lets root be refused by file permissions like everybody else, from the next exec on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (_DAC_OVERRIDE, _DAC_READ_SEARCH):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused where there is no need for it


def limit_files(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: writing fails as it does on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@dataclass(frozen=True)
class CommandLine:
    folder: Path
    home: Path
    model: Path
    warm: Warm | None = None

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "BATCHRUN_HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
        }

    def argv(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "batchrun", *map(str, arguments)]

    def __call__(self, *arguments: object, before: Callable[[], None] | None = None) -> Shown:
        words = [str(argument) for argument in arguments]
        if self.warm and before is None and ("--dry-run" in words or words[0] == "plan"):
            return Shown(*self.warm.run(words, self.folder, self.environment()))
        done = subprocess.run(
            self.argv(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=before,
        )
        return Shown(done.returncode, done.stdout, done.stderr)

    def submit(self, *arguments: object, before: Callable[[], None] | None = None) -> Shown:
        model = () if "--model" in arguments else ("--model", self.model)
        return self("submit", *arguments, *model, before=before)

    def unstarted(self, source: Path, output: str = "out.jsonl") -> Path:
        """The folder of a job over `source` that was submitted and never ran."""
        spec = JobSpec(
            inputs=(InputFile.of(source),),
            input_format="parquet" if source.suffix == ".parquet" else "jsonl",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec(
                name=str(self.model),
                path=str(self.model),
                fingerprint=fingerprint(self.model),
                dtype="auto",
            ),
            sampling=SamplingSpec(max_tokens=2),
            output=OutputSpec(path=str(self.folder / output), format="jsonl"),
        )
        return create(self.home, spec).path

    def write(self, name: str, prompts: list[Any], **columns: list[Any]) -> Path:
        """A Parquet or JSON Lines file in the folder."""
        path = self.folder / name
        table = {"prompt": prompts, **columns}
        if path.suffix == ".parquet":
            pq.write_table(pa.table(table), path)
        else:
            columns_of_rows = zip(*table.values(), strict=True)
            rows = [dict(zip(table, values, strict=True)) for values in columns_of_rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def read(self, name: str) -> list[dict[str, Any]]:
        """Rows of an output."""
        path = self.folder / name
        if path.suffix == ".parquet":
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
            return rows
        return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    found = Warm()
    yield found
    found.close()


@pytest.fixture
def batchrun(tmp_path: Path, tiny_model: Path, warm: Warm) -> CommandLine:
    folder = tmp_path / "work"
    folder.mkdir()
    return CommandLine(folder, tmp_path / "home", tiny_model, warm)


@pytest.fixture
def gate(batchrun: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Closed after 60 steps."""
    found = Gate(batchrun.folder / "gate")
    found.place.mkdir()
    found.close(60)
    monkeypatch.setenv("PYTHONPATH", f"{found.place}:{os.environ.get('PYTHONPATH', '')}")
    return found
