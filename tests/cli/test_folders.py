"""Model folders people have, given to the real command: one error, one hint, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import CommandLine, obey_permissions
from tests.tiny import edit_config, edit_weights, quantise_to_fp8, shard_weights, write_tiny_gguf

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def copied(batchrun: CommandLine, tmp_path: Path) -> CommandLine:
    """With a copy of the model that a test may change, in a folder with a space in its name."""
    return replace(batchrun, model=shutil.copytree(batchrun.model, tmp_path / "my model"))


def without_mlp(weights: dict[str, Any]) -> dict[str, Any]:
    return {key: tensor for key, tensor in weights.items() if "layers.1.mlp" not in key}


def with_nan(weights: dict[str, Any]) -> dict[str, Any]:
    weights[DOWN][3, 3] = float("nan")
    return weights


def newer_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "NewKind"
    (folder / "tokenizer.json").write_text(json.dumps(content))


def lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text(LFS)


def shard_gone(folder: Path) -> None:
    shard_weights(folder)[0].unlink()


def adapter(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


@pytest.mark.parametrize(
    ("harm", "error", "hint"),
    [
        (lfs, "a Git LFS pointer", "git lfs pull"),
        (shard_gone, "lacks 1 of the 6 weight files", "hf download"),
        (adapter, "is an adapter", "merge_and_unload"),
        (lambda f: edit_config(f, architectures=["LlamaForScore"]), "LlamaForScore", "ForCausalLM"),
        (
            lambda f: edit_config(f, quantization_config={"quant_method": "awq"}),
            "AWQ",
            "pip install gptqmodel",
        ),
    ],
)
def test_what_the_files_tell_is_told_before_there_is_a_job(
    copied: CommandLine, harm: Callable[[Path], None], error: str, hint: str
) -> None:
    harm(copied.model)
    shown = copied.submit(copied.write("in.jsonl", ["one"]))
    assert (shown.code, error in shown.error, hint in shown.hint) == (1, True, True)
    assert copied("list", "--json").json == []


@pytest.mark.parametrize(
    ("harm", "error", "hint"),
    [
        (lambda f: edit_weights(f, without_mlp), "lack 3 of the 21 tensors", "again"),
        (lambda f: edit_weights(f, with_nan), f"{DOWN} has 1 value that is not finite", "again"),
        (newer_tokenizer, "did not match any variant", "pip install --upgrade tokenizers"),
        (lambda f: edit_config(f, hidden_size="big"), "expected int, got str", "came with"),
        (lambda f: edit_config(f, vocab_size=999), "do not fit its config.json", "vocab_size"),
    ],
)
def test_what_only_loading_tells_ends_the_job_and_is_no_bug(
    copied: CommandLine, harm: Callable[[Path], None], error: str, hint: str
) -> None:
    harm(copied.model)
    shown = copied.submit(copied.write("in.jsonl", ["one"]), "--wait", "-o", "out.jsonl")
    assert (shown.code, error in shown.error, hint in shown.hint) == (1, True, True)
    assert "bug" not in shown.err
    (job,) = copied("list", "--json").json
    assert job["state"] == "failed"
    assert not list(copied.home.glob("verdicts/*"))


def test_the_traceback_of_the_cause_is_in_the_workers_log(copied: CommandLine) -> None:
    newer_tokenizer(copied.model)
    copied.submit(copied.write("in.jsonl", ["one"]), "--wait")
    (log,) = copied.home.glob("jobs/*/worker.log")
    text = log.read_text()
    assert "Traceback (most recent call last)" in text
    assert text.index("did not match any variant") < text.index("error: the tokenizer of the model")


def test_a_model_that_may_not_be_read(copied: CommandLine) -> None:
    (copied.model / "model.safetensors").chmod(0)
    source = copied.write("in.jsonl", ["one"])
    shown = copied.submit(source, before=obey_permissions)
    assert shown.code == 1
    assert "model.safetensors: Permission denied" in shown.error
    assert "ls -ld" in shown.hint
    copied.model.chmod(0)
    shown = copied.submit(source, before=obey_permissions)
    copied.model.chmod(0o755)
    assert (shown.code, "Permission denied" in shown.error) == (1, True)


def test_a_part_of_a_gguf_file(batchrun: CommandLine) -> None:
    file = write_tiny_gguf(batchrun.folder / "m-00001-of-00002.gguf", parts=2)
    shown = batchrun.submit(batchrun.write("in.jsonl", ["one"]), "--model", file)
    assert (shown.code, "part 1 of 2" in shown.error) == (1, True)
    assert "llama-gguf-split --merge" in shown.hint


def test_fp8_and_what_lies_beside_a_model_run(copied: CommandLine) -> None:
    quantise_to_fp8(copied.model)
    (copied.model / "consolidated.safetensors").write_text(LFS)
    source = copied.write("in.jsonl", ["one"])
    shown = copied.submit(source, "--wait", "--max-tokens", 3, "-o", "out.jsonl")
    assert (shown.code, "quantised by FP8 but computed in" in shown.err) == (0, True)
    assert copied.read("out.jsonl")[0]["error"] is None


def test_a_context_of_millions_of_tokens(copied: CommandLine) -> None:
    # 256 slots of it would take 2^47 bytes of addresses and more.
    edit_config(copied.model, max_position_embeddings=1 << 32)
    source = copied.write("in.jsonl", ["one"])
    run = (source, "--wait", "--max-tokens", 3, "--dtype", "float32", "--overwrite", "--again")
    shown = copied.submit(*run, "-o", "out.jsonl")
    assert (shown.code, "context limited to 536,870,912 of 4,294,967,296 tokens" in shown.err) == (
        0,
        True,
    )
    some = copied.submit(*run, "-o", "out.jsonl", "--max-model-len", 1 << 32, "--max-num-seqs", 9)
    assert (some.code, "context of" in some.err) == (0, False)
    all_ = copied.submit(*run, "-o", "out.jsonl", "--max-model-len", 1 << 32)
    assert (all_.code, "--max-model-len 536870912 or less" in all_.hint) == (1, True)
