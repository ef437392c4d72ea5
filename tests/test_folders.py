"""Folders people have: what is no model that can run is refused at once, by what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from batchrun.errors import ModelError
from batchrun.models.resolve import fingerprint, resolve
from tests.tiny import (
    edit_config,
    quantise_to_fp8,
    shard_weights,
    write_tiny_gguf,
    write_tiny_model,
    write_tokenizer,
)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "my model")


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: write(name, (folder / name).read_bytes()[:size])(folder)


def config(**changes: object) -> Callable[[Path], object]:
    return lambda folder: edit_config(folder, **changes)


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def gone(*names: str) -> Callable[[Path], object]:
    return lambda folder: [file.unlink() for name in names for file in folder.glob(name)]


def renamed(old: str, new: str) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / new)


def of(model: Any) -> Callable[[Path], object]:
    """A folder of another class, as `save_pretrained` writes it."""

    def make(folder: Path) -> None:
        shutil.rmtree(folder)
        model().save_pretrained(folder)
        write_tokenizer(folder)

    return make


def no_shard(folder: Path) -> None:
    shard_weights(folder)[2].unlink()


def no_index(folder: Path) -> None:
    shard_weights(folder)
    (folder / INDEX).unlink()


def short_shard(folder: Path) -> None:
    shard = shard_weights(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def dangling(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "blob")
    (folder / WEIGHTS).symlink_to("nowhere")


def quantised(method: str) -> Callable[[Path], object]:
    return config(quantization_config={"quant_method": method, "bits": 4, "group_size": 128})


SIZE = 130_504  # bytes of the tiny model's weights
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
MODULES = json.dumps([{"type": "sentence_transformers.models.Transformer"}])
MLX = {"group_size": 64, "bits": 4}

CASES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # what a download leaves behind
    "lfs-weights": (write(WEIGHTS, LFS), r"a Git LFS pointer .* in place of 4,976", "git lfs pull"),
    "lfs-tokenizer": (write("tokenizer.json", LFS), r"tokenizer.json .* pointer", "hf download"),
    "lfs-config": (write("config.json", LFS), r"config.json .* pointer", "hf download"),
    "cut": (cut(WEIGHTS, SIZE - 9), r"incomplete: it has 130,495 bytes, .* 130,504", "hf download"),
    "cut-header": (cut(WEIGHTS, 300), r"incomplete: it has 300 bytes, .* header", "hf download"),
    "cut-length": (cut(WEIGHTS, 5), r"\(5 bytes\) is not a safetensors file", "hf download"),
    "longer": (
        lambda folder: write(WEIGHTS, (folder / WEIGHTS).read_bytes() + b"x")(folder),
        "damaged: it has 130,505",
        "hf download",
    ),
    "empty": (write(WEIGHTS, b""), "is empty: its download was interrupted", "hf download"),
    "zeros": (write(WEIGHTS, bytes(9999)), "begins with 512 bytes of zeros", "hf download"),
    "web-page": (write(WEIGHTS, "<!DOCTYPE html><p>404"), "is a web page", "hf download"),
    "garbage": (write(WEIGHTS, b"\x10" + bytes(7) + b"x" * 16), "header can't be read", "again"),
    "no-shard": (no_shard, "lacks 1 of the 6 weight files .* model-00003-of", "hf download"),
    "short-shard": (short_shard, "model-00002-of-00006.* is incomplete", "hf download"),
    "no-index": (no_index, r"-of-00006.*but no model.safetensors.index.json", "download it"),
    "bad-index": (
        both(gone(WEIGHTS), write(INDEX, "{}")),
        "is not an index of weight files",
        "hf download",
    ),
    "dangling": (dangling, "a link to a file that does not exist", "hf download"),
    # metadata
    "no-type": (config(model_type=None), 'has no "model_type"', "came with the weights"),
    "a-list": (write("config.json", "[]"), "holds a list, not a JSON object", "hf download"),
    "not-utf-8": (write("config.json", b'{"a": "\xff"}'), "not valid JSON: 'utf-8'", "fix it"),
    "bad-tokenizer-config": (
        write("tokenizer_config.json", "{"),
        "tokenizer_config.json is not valid JSON",
        "fix it",
    ),
    "no-tokenizer": (gone("tokenizer*"), "has no tokenizer", "copy tokenizer.json"),
    # other things than a language model
    "adapter": (
        both(gone("config.json", WEIGHTS), write("adapter_config.json", ADAPTER)),
        r"is an adapter \(LoRA or similar\) of org/base",
        "merge_and_unload",
    ),
    "adapter-beside": (
        write("adapter_config.json", ADAPTER),
        "both a whole model and an adapter of org/base",
        "move the adapter_",
    ),
    "diffusers": (write("model_index.json", "{}"), "is a diffusers pipeline", "ForCausalLM"),
    "sentences": (write("modules.json", MODULES), "is a sentence-transformers model", "ForCausal"),
    "classifier": (
        of(lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**SMALL, pad_token_id=0))),
        r"is a classifier: .* \(its config.json says GPT2ForSequenceClassification\)",
        "ForCausalLM",
    ),
    "reward": (config(architectures=["Qwen2ForRewardModel"]), "is a reward model", "ForCausalLM"),
    "rewarding": (config(architectures=["LlamaForRewardModelWithGating"]), "reward", "ForCausalLM"),
    "score": (config(architectures=["LlamaForScore"]), "says LlamaForScore", "ForCausalLM"),
    "as-text": (config(architectures="LlamaForScore"), "says LlamaForScore", "ForCausalLM"),
    "base": (
        of(lambda: tf.LlamaModel(tf.LlamaConfig(**SMALL, intermediate_size=16))),
        "is a model without the head that predicts tokens",
        '"architectures": ["LlamaForCausalLM"]',
    ),
    "bert": (
        of(lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, intermediate_size=16))),
        "is a masked language model",
        "ForCausalLM",
    ),
    "images": (
        of(
            lambda: tf.ViTForImageClassification(tf.ViTConfig(**{**SMALL, "intermediate_size": 16}))
        ),
        "says ViTForImageClassification",
        "ForCausalLM",
    ),
    "t5": (
        of(
            lambda: tf.T5ForConditionalGeneration(
                tf.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            )
        ),
        r"is an encoder-decoder model \(t5\)",
        "ForCausalLM",
    ),
    # other formats
    "onnx": (
        both(gone(WEIGHTS), write("model.onnx", "x")),
        r"no \*.safetensors weights but model.onnx",
        ".gguf",
    ),
    "consolidated": (
        renamed(WEIGHTS, "consolidated.safetensors"),
        "only in its maker's own format",
        "model*.safetensors",
    ),
    "params": (
        both(gone("config.json"), write("params.json", "{}")),
        r"maker's own format \(params.json\)",
        "in the format of transformers",
    ),
    "other-name": (renamed(WEIGHTS, "w.safetensors"), "has w.safetensors, but", "mv "),
    "mlx": (config(quantization=MLX, quantization_config=MLX), "quantised for MLX", "GGUF"),
    "gptq": (quantised("gptq"), "GPTQ, and optimum and gptqmodel, .* are not", "pip install opt"),
    "awq": (quantised("awq"), "by AWQ, and gptqmodel, .* is not installed", "gptqmodel, or use"),
    "bnb": (
        config(quantization_config={"load_in_4bit": True}),
        "by bitsandbytes, and bitsandbytes",
        "pip install bitsandbytes",
    ),
    "compressed": (quantised("compressed-tensors"), "compressed_tensors", "compressed-tensors, or"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_can_not_run_is_refused_by_what_it_is(
    case: str, folder: Path, tmp_path: Path
) -> None:
    make, says, hint = CASES[case]
    make(folder)
    with pytest.raises(ModelError, match=says) as caught:
        resolve(str(folder), tmp_path / "cache")
    assert str(folder) in str(caught.value)
    assert hint in str(caught.value.hint)


def hub_cache(folder: Path) -> None:
    """As the hub's cache has it: links to blobs."""
    blobs = folder / "blobs"
    blobs.mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(blobs / file.name)
        file.symlink_to(Path("blobs", file.name))


def with_leftovers(folder: Path) -> None:
    shards = shard_weights(folder)
    shutil.copy(shards[0], folder / "model-00001-of-00099.safetensors")
    for name in (
        "consolidated.safetensors",
        "tokenizer.model",
        "consolidated-00001-of-2.safetensors",
    ):
        (folder / name).write_text(LFS)  # not loaded, so never fetched


FINE: dict[str, Callable[[Path], object]] = {
    "no-architectures": config(architectures=None),
    "hub-cache": hub_cache,
    "leftovers": with_leftovers,
    "explicit": both(
        renamed(WEIGHTS, "w.safetensors"), config(transformers_weights="w.safetensors")
    ),
    "base-with-a-head": config(architectures=["LlamaModel"]),
    "vision-language": config(architectures=["Gemma3ForConditionalGeneration"]),
    "fp8": quantise_to_fp8,
    "unquantised": config(quantization_config=None),
}


@pytest.mark.parametrize("case", FINE)
def test_a_folder_that_may_run_is_not_refused(case: str, folder: Path, tmp_path: Path) -> None:
    FINE[case](folder)
    assert resolve(f"{folder}/", tmp_path / "cache").path == folder


def test_what_is_not_loaded_is_not_in_the_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    assert fingerprint(folder) == before
    shard_weights(folder)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("inner", "hint"),
    [("snapshots/abc", "--model {}/snapshots/abc"), ("checkpoint-9", "--model {}/checkpoint-9")],
)
def test_a_folder_around_a_model_names_the_model(
    inner: str, hint: str, saved: Path, tmp_path: Path
) -> None:
    outer = tmp_path / "outer"
    shutil.copytree(saved, outer / inner)
    with pytest.raises(ModelError, match=r"has no config.json") as caught:
        resolve(str(outer), tmp_path / "cache")
    assert hint.format(outer) in str(caught.value.hint)


def test_the_makers_own_format_beside_that_of_transformers(folder: Path, tmp_path: Path) -> None:
    original = folder / "original"
    original.mkdir()
    (original / "params.json").write_text("{}")
    with pytest.raises(ModelError, match="own format") as caught:
        resolve(str(original), tmp_path)
    assert str(caught.value.hint).endswith(f"--model {folder}")


# --- GGUF ----------------------------------------------------------------------------------------


def refused(file: Path, cache: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve(str(file), cache)
    left = {path.name for path in cache.iterdir()} if cache.exists() else set()
    assert left <= {".lock"}, "something was cached"
    return caught.value


def test_a_part_of_a_gguf_file_is_refused(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "m-00001-of-00002.gguf", parts=2)
    error = refused(file, tmp_path / "cache")
    assert "it is part 1 of 2 of a model" in str(error)
    assert "llama-gguf-split --merge" in str(error.hint)


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output_norm.weight"])
def test_a_gguf_file_that_lacks_tensors_is_refused(name: str, tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "m.gguf", layers=2, without={name})
    error = refused(file, tmp_path / "cache")
    assert f"the weights of the model {file} lack 1 of the" in str(error)


def test_a_gguf_file_says_how_much_of_it_is_there(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "m.gguf")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5000])
    assert f"is incomplete, with {size - 5000:,} of " in str(refused(file, tmp_path / "cache"))
    file.write_bytes(file.read_bytes()[:2000])
    assert "ends within its header, after 2,000 bytes" in str(refused(file, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (LFS.encode(), "pointer"), (b"what", "is not a GGUF file")],
)
def test_what_is_no_gguf_file_is_told(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    assert says in str(refused(file, tmp_path / "cache"))


def test_a_gguf_file_may_have_any_name(tmp_path: Path) -> None:
    blob = write_tiny_gguf(tmp_path / "sha256-0123")
    assert (resolve(str(blob), tmp_path / "cache").path / "config.json").exists()


def test_a_folder_of_parts_says_to_merge_them(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError) as caught:
        resolve(str(tmp_path), tmp_path / "cache")
    assert "llama-gguf-split --merge" in str(caught.value.hint)
