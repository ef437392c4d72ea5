"""What a soak's jobs do: random inputs, models and options, and what each must come to."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.tiny import CONTEXT, byte_vocabulary, write_tiny_model, write_tokenizer

_WORDS = [
    "river",
    "stone",
    "lamp",
    "seven",
    "copper",
    "garden",
    "slow",
    "window",
    "north",
    "naïve",
    "漢字",
    "<|im_end|>",
]
_MEAN = "mean_logprob"
_FORMATS = ("jsonl", "csv", "parquet")
_PATHS = {"one": ((), 1), "three": (("--n", 3), 3), "beams": (("--num-beams", 3), 1)}
_PATHS["best"] = (("--best-of", 4, "--n", 2, "--temperature", 0.9), 2)


@dataclass(frozen=True)
class Work:
    """One job's input and options.

    Attributes:
        name: Of its files.
        source: The input.
        arguments: Of `submit`, all but the output.
        suffix: The output's.
        failing: Whether some rows must become errors.
    """

    name: str
    source: Path
    arguments: tuple[object, ...]
    suffix: str
    failing: bool

    @property
    def output(self) -> str:
        """The output's name."""
        return f"{self.name}-out.{self.suffix}"


def write_models(root: Path) -> list[Path]:
    """A plain one, one with a sliding window, one in which windows and full attention alternate."""
    import torch  # noqa: PLC0415
    import transformers as tf  # noqa: PLC0415

    sizes: dict[str, Any] = {
        "vocab_size": len(byte_vocabulary()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    mixed = ["sliding_attention", "full_attention"]
    windows = {
        "window": tf.MistralConfig(**sizes, sliding_window=23),
        "mixed": tf.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=19, layer_types=mixed),
    }
    models = [write_tiny_model(root / "plain")]
    for name, config in windows.items():
        torch.manual_seed(7)
        tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
            root / name
        )
        write_tokenizer(root / name)
        models.append(root / name)
    return models


def draw(root: Path, models: list[Path], rng: random.Random, number: int) -> Work:
    """A random job; its input is written to `root`."""
    kind, rows = rng.choice(_FORMATS), rng.randint(30, 90)
    path, samples = _PATHS[rng.choice(list(_PATHS))]
    chats = kind != "csv" and rng.random() < 0.3
    bad = rng.random() < 0.5
    source = root / f"in-{number}.{kind}"
    write(source, list(_rows(rng, rows // samples, chats=chats, bad=bad)))
    options: list[object] = [*path, "--seed", rng.randint(0, 9), "--max-tokens", rng.randint(4, 30)]
    beams = "--num-beams" in path
    if not beams and "--temperature" not in path and (samples > 1 or rng.random() < 0.6):
        options += ["--temperature", 0.8, "--top-p", 0.95]
    if not chats and rng.random() < 0.3:
        options += ["--chat"] if rng.random() < 0.5 else ["--template", "Say {prompt} once more"]
    options += ["--stop", "e"] if not beams and rng.random() < 0.3 else []
    options += ["--ignore-eos"] if rng.random() < 0.5 else []
    options += ["--no-reorder"] if rng.random() < 0.3 else []
    options += ["--no-share-prefixes"] if rng.random() < 0.2 else []
    options += ["--token-ids"] if rng.random() < 0.3 else []
    options += ["--max-num-seqs", rng.choice([3, 8, 32])]
    options += ["--kv-budget", rng.choice(["512KiB", "1MiB", "64MiB"])]
    model = ("--model", rng.choice(models), "--dtype", "float32", "--device", "cpu")
    suffix = rng.choice(["jsonl", "parquet", kind])
    return Work(f"job-{number}", source, (*model, *options), suffix, bad)


def alike(one: Path, other: Path) -> bool:
    """Whether outputs are the same, byte by byte; but for the rounding of log-probabilities.

    These are sums in float32, whose last bits depend on what else is computed in a step.
    """
    if one.read_bytes() == other.read_bytes():
        return True
    mine, theirs = _read(one), _read(other)
    return len(mine) == len(theirs) and all(
        math.isclose(float(a.pop(_MEAN, 0)), float(b.pop(_MEAN, 0)), rel_tol=1e-5) and a == b
        for a, b in zip(mine, theirs, strict=True)
    )


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{**row, _MEAN: row.get(_MEAN) or 0} for row in rows]


def write_many(path: Path, rows: int) -> None:
    """The input of a job that is long: short prompts, no two alike."""
    with path.open("w") as file:
        file.writelines(f'{{"prompt": "number {i}"}}\n' for i in range(rows))


def _rows(rng: random.Random, count: int, *, chats: bool, bad: bool) -> Iterator[dict[str, Any]]:
    """Rows of which some are alike, some begin alike, and some, if wanted, can't be computed."""
    texts = [" ".join(rng.choices(_WORDS, k=rng.randint(1, 9))) for _ in range(count)]
    for i in range(count):
        text: str | None = rng.choice(texts) if rng.random() < 0.2 else texts[i]
        if rng.random() < 0.2:
            text = f"The same beginning of several prompts: {text}"
        if bad and i % 11 == 3:
            text = None if i % 2 else "far too long " * 50
        row: dict[str, Any] = {"id": i, "note": rng.choice(_WORDS)}
        if chats:
            row["messages"] = text and [{"role": "user", "content": text}]
        else:
            row["prompt"] = text
        yield row


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """An input in the format of its name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=37)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
