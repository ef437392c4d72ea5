"""The command line as users type it: a job, the same job killed and resumed, and on all devices."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.holders import holders, send
from batchrun.jobs.lease import LOCK, held_by
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import ROOT
from benchmarks.gpu.shapes import SHAPES, Shape, chats
from tests.tiny import byte_vocabulary, write_tokenizer

_POLL_S = 0.02
_SPARE_S = 5.0  # to print what the jobs said, when they take too long


def run(bench: Bench) -> Iterator[dict[str, Any]]:
    """Figures of the uninterrupted job, then of the one that is killed, each checked row by row."""
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(bench, Path(name))
        try:
            whole = trial.submit("whole.parquet", "--device", "cpu" if bench.toy else "cuda")
            yield trial.figures(whole["job"]) | {"wall_s": whole["wall_s"]}
            yield trial.answers("whole.parquet")
            yield trial.killed()
            yield trial.answers("killed.parquet")
            yield {"same_completions": trial.same("whole.parquet", "killed.parquet")}
            workers = trial.submit("fleet.parquet", "--devices", "cpu:2" if bench.toy else "all")
            yield trial.answers("fleet.parquet") | {"fleet_wall_s": workers["wall_s"]}
            yield {"same_completions_fleet": trial.same("whole.parquet", "fleet.parquet")}
        finally:
            trial.print_logs()


class Trial:
    """A folder with a model, a file of prompts, and the jobs made of them."""

    def __init__(self, bench: Bench, folder: Path, *, whole: bool = False) -> None:
        self.bench = bench
        self.folder = folder
        self.home = folder / "home"
        self.sequences = bench.size(256 if whole else 64, 4)
        write_model(bench, folder / "model", SHAPES["qwen3-0.6b"] if whole else None)
        table = chat_rows(bench) if whole else odd_rows(bench)
        pq.write_table(table, folder / "rows.parquet")
        self.rows = table.num_rows

    def cli(self, *arguments: str) -> Any:
        """What `batchrun ... --json` prints.

        Raises:
            RuntimeError: It failed; the message ends with what it said last.
        """
        done = subprocess.run(
            [sys.executable, "-m", "batchrun", *arguments, "--json"],
            cwd=self.folder,
            env={
                **os.environ,
                "BATCHRUN_HOME": str(self.home),
                "HF_HUB_OFFLINE": "1",
                # From a checkout that is not installed, too.
                "PYTHONPATH": os.pathsep.join(
                    [str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]
                ),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=self.bench.left - _SPARE_S,
        )
        print(done.stderr, flush=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            wrong = [line for line in said if line.startswith("error")] or said[-1:]
            raise RuntimeError(f"batchrun {arguments[0]}, exit code {done.returncode}: {wrong}")
        return json.loads(done.stdout)

    def submit(self, output: str, *more: str) -> Any:
        """Submit the job, its answers to go to `output`."""
        options = ["--model", str(self.folder / "model"), "--attention", self.bench.attention]
        options += ["--dtype", "float32" if self.bench.toy else "bfloat16", "--temperature", "0"]
        options += ["--ignore-eos", "--token-ids", "--max-num-seqs", str(self.sequences)]
        return self.cli("submit", "rows.parquet", *options, "--again", "--output", output, *more)

    def killed(self) -> dict[str, Any]:
        """Submit, kill all processes of the job when it has some of its rows, resume.

        A job that was faster than the kill is submitted anew.
        """
        more = ["--device", "cpu"] if self.bench.toy else []  # else what `auto` chooses
        kept = self.rows
        while kept == self.rows:
            found = self.submit("killed.parquet", "--overwrite", "--detach", *more)["job"]
            job = JobFolder(self.home / "jobs" / found)
            began = self._kill(job)
            gone, kept = time.perf_counter() - began, job.counts().rows
        if not kept or job.state() != "interrupted":
            raise RuntimeError(f"the killed job is {job.state()} with {kept} of {self.rows} rows")
        resumed = self.cli("resume", found)["rows"]["resumed"]
        if resumed != kept:
            raise RuntimeError(f"{kept} rows were done, but {resumed} were kept")
        return {"rows_at_kill": kept, "kill_s": gone, "resume_s": time.perf_counter() - began}

    def _kill(self, job: JobFolder) -> float:
        """Kill all processes of a job when it has some of its rows; when that began."""
        while job.counts().rows < self.rows // 8:
            if held_by(job.path) is None and job.state() != "done":
                raise RuntimeError(f"the job was {job.state()} before it could be killed")
            if self.bench.left < _SPARE_S:
                raise TimeoutError(f"{job.counts().rows} of {self.rows} rows are done")
            time.sleep(_POLL_S)
        began = time.perf_counter()
        while held_by(job.path) is not None:
            for process in holders(job.path / LOCK):  # its supervisor and the run
                send(job.path / LOCK, process, signal.SIGKILL)
            time.sleep(_POLL_S)
        return began

    def figures(self, job: str) -> dict[str, Any]:
        """What `batchrun stats` says of a job, and whether it ran where it should have."""
        stats = self.cli("stats", job)
        wanted = "cpu" if self.bench.toy else "cuda:0"
        if stats["device"] != wanted:
            raise RuntimeError(f"the job ran on {stats['device']}, not on {wanted}")
        kv, times, tokens = stats["kv"], stats["time"], stats["tokens"]
        return {
            "device": stats["device"],
            "attention": stats["attention"],
            "rows": stats["rows"]["done"],
            "tokens": tokens["completion"],
            "recomputed": tokens["recomputed"],
            "preemptions": stats["preemptions"],
            "load_s": times["load_s"],
            "engine_s": times["engine_s"],
            "tokens_per_s": stats["throughput"]["completion_tokens_per_s"],
            "steps": stats["batch"]["steps"],
            "map_hidden_s": kv["map_hidden_s"],
            "map_exposed_s": kv["map_exposed_s"],
            "device_s": stats["device_time"]["busy_s"],
            "idle_s": stats["device_time"]["idle_s"],
            "log": [line["message"] for line in self._log(job)],
        }

    def answers(self, output: str) -> dict[str, Any]:
        """Whether each row has its answer, in the order of the input and of the length asked for.

        Raises:
            RuntimeError: One has not.
        """
        given, got = (pq.read_table(self.folder / name) for name in ("rows.parquet", output))
        if got["id"].to_pylist() != given["id"].to_pylist():
            raise RuntimeError(f"{output} has {got.num_rows} rows, or not in the input's order")
        prompts = [len(prompt) for prompt in given["prompt"].to_pylist()]  # a token a character
        for name, wanted in (
            ("prompt_tokens", prompts),
            ("completion_tokens", given["max_tokens"].to_pylist()),
            ("error", [None] * self.rows),
            ("finish_reason", ["length"] * self.rows),
        ):
            values = got[name].to_pylist()
            if values != wanted:
                row = next(i for i in range(self.rows) if values[i] != wanted[i])
                what = f"{name} is {values[row]!r} and not {wanted[row]!r}"
                raise RuntimeError(f"row {row} of {output}: {what}")
        return {f"answers_in_{Path(output).stem}": got.num_rows}

    def same(self, *outputs: str) -> float:
        """The share of rows with the same tokens in both: a near tie may go either way."""
        one, other = (
            pq.read_table(self.folder / name)["completion_token_ids"].to_pylist()
            for name in outputs
        )
        return sum(a == b for a, b in zip(one, other, strict=True)) / self.rows

    def print_logs(self) -> None:
        """What the jobs' processes said, into the part's own log."""
        for job in sorted((self.home / "jobs").glob("*")):
            for name in ("worker.log", "log.jsonl", "stats.json"):
                if (job / name).exists():
                    print(f"--- {job.name}/{name}\n{(job / name).read_text()}", flush=True)

    def _log(self, job: str) -> list[dict[str, Any]]:
        lines = (self.home / "jobs" / job / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def write_model(bench: Bench, folder: Path, shape: Shape | None = None) -> None:
    """A Llama of random weights; a small one, its heads as wide as kernels have them, or `shape`.

    Its tokens are bytes whatever the shape, so that its answers are text.
    """
    torch.manual_seed(7)
    hidden, shape = bench.size(512, 64), None if bench.toy else shape
    config = LlamaConfig(
        vocab_size=len(byte_vocabulary()),
        hidden_size=shape.hidden if shape else hidden,
        intermediate_size=shape.intermediate if shape else 2 * hidden,
        num_hidden_layers=shape.layers if shape else bench.size(4, 2),
        num_attention_heads=shape.q_heads if shape else 4,
        num_key_value_heads=shape.kv_heads if shape else 2,
        head_dim=shape.head_dim if shape else hidden // 4,
        max_position_embeddings=bench.size(16384, 2048),
        initializer_range=0.05,  # so that tokens are chosen by more than rounding
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    dtype = torch.float32 if bench.toy else torch.bfloat16
    with torch.device(bench.device):
        model = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)


def odd_rows(bench: Bench) -> pa.Table:
    """Prompts of many lengths, some that begin alike, one longer than a step."""
    rng = random.Random(3)
    count = bench.size(512, 48)
    longest = bench.size(12_000, 1_500)
    common = _text(rng, bench.size(600, 100))
    prompts = [_text(rng, rng.randint(3, 200)) for _ in range(count)]
    prompts[::5] = [common + prompt for prompt in prompts[::5]]
    prompts[count // 3] = _text(rng, longest)
    lengths = [rng.randint(16, bench.size(400, 80)) for _ in range(count)]
    lengths[::16] = [1] * len(lengths[::16])
    return pa.table({"id": list(range(count)), "prompt": prompts, "max_tokens": lengths})


def chat_rows(bench: Bench) -> pa.Table:
    """As many tokens in and out as chats have."""
    rng = random.Random(4)
    lengths = chats(bench.size(4000, 48), longest=bench.size(1024, 60))
    return pa.table(
        {
            "id": list(range(len(lengths))),
            "prompt": [_text(rng, size) for size, _ in lengths],
            "max_tokens": [out for _, out in lengths],
        }
    )


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefghij klmnop", k=length))
