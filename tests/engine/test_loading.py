"""Weights that are not whole, not finite or not a language model's are refused by name."""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from batchrun.engine.core import EngineError
from batchrun.engine.model import loading
from batchrun.engine.model.int8 import int8_weights
from batchrun.engine.model.loading import reading
from batchrun.errors import ModelError
from batchrun.models import whole
from tests.parity.models import CONFIGS, build
from tests.tiny import edit_config, edit_weights, quantise_to_fp8, shard_weights, write_tiny_model

Weights = dict[str, Any]
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


def load(folder: Path, **options: Any) -> Any:
    return loading.load(str(folder), name="mine", dtype="float32", **options)


def refused(folder: Path, says: str) -> ModelError:
    with pytest.raises(ModelError, match=says) as caught:
        load(folder)
    assert "mine" in str(caught.value)
    assert caught.value.hint
    return caught.value


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        key: tensor for key, tensor in weights.items() if not any(name in key for name in names)
    }


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: tensor for key, tensor in weights.items()}


# --- missing, extra, misshapen -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        (without("layers.1.mlp"), r"lack 3 of the 21 tensors .*layers.1.mlp.down", "again"),
        (without(HEAD), "lack 1 of the 21 tensors of LlamaForCausalLM: lm_head", "no head"),
        (without(EMBEDDING), "lack 1 of the 21 .*: model.embed_tokens.weight", "again"),
        (prefixed("module."), "lack 21 of .* and 18 more", "as module.lm_head.weight"),
        (prefixed("base_model.model."), "lack 21", "as base_model.model.lm_head"),
    ],
)
def test_weights_that_are_missing_are_named(
    folder: Path, change: Callable[[Weights], Weights], says: str, hint: str
) -> None:
    edit_weights(folder, change)
    assert hint in str(refused(folder, says).hint)


def test_a_tensor_that_is_in_no_shard_is_missing(folder: Path) -> None:
    shard = shard_weights(folder)[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(key for key, file in index.items() if file == shard.name)
    shard.rename(folder / "model.safetensors")
    edit_weights(folder, lambda weights: {**without(name)(weights), "other": torch.ones(1)})
    (folder / "model.safetensors").rename(shard)
    with pytest.raises(ModelError, match=f"lacks 1 of the 21 tensors that .*: '{name}'"):
        load(folder)


def test_a_tied_head_is_not_missing(folder: Path) -> None:
    edit_weights(folder, without(HEAD))
    edit_config(folder, tie_word_embeddings=True)
    loaded = load(folder)
    assert loaded.notes == ()
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_transformers_saved_is_whole(kind: str, folder: Path) -> None:
    for file in folder.glob("*model*"):
        file.unlink()
    build(kind).save_pretrained(folder)
    assert load(folder).notes == ()


def test_buffers_that_models_once_saved_are_no_news(folder: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_weights(folder, lambda weights: weights | old)
    assert load(folder).notes == ()


def test_tensors_that_are_not_used_are_told_once(folder: Path) -> None:
    extra = {f"vision.layers.{i}.weight": torch.ones(2) for i in range(5)}
    edit_weights(folder, lambda weights: weights | extra)
    (note,) = load(folder).notes
    assert note.startswith("5 tensors of the weights are not used by LlamaForCausalLM: vision.lay")
    assert note.endswith("and 2 more")


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    error = refused(folder, "do not fit its config.json: .*down_proj.weight is 32x48, not 32x64")
    assert "came with the weights" in str(error.hint)


def test_a_vocabulary_that_was_padded_says_what_to_write(folder: Path) -> None:
    edit_config(folder, vocab_size=320)
    error = refused(folder, "lm_head.weight is 259x32, not 320x32")
    assert '"vocab_size": 259' in str(error.hint)


# --- quantised -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fp8_without_a_gpu_for_it_is_widened(folder: Path, saved: Path, dtype: str) -> None:
    quantise_to_fp8(folder)
    loaded = loading.load(str(folder), dtype=dtype)
    wanted = loading.DTYPES[dtype]
    assert {p.dtype for p in loaded.model.parameters()} == {wanted}
    assert f"quantised by FP8 but computed in {dtype}" in loaded.notes[0]
    exact = loading.load(str(saved), dtype="float32").model.get_parameter(DOWN)
    torch.testing.assert_close(
        loaded.model.get_parameter(DOWN).float(), exact, rtol=0.08, atol=1e-3
    )
    whole.check_finite(loaded.model)


def test_quantised_weights_whose_config_does_not_say_so_are_refused(folder: Path) -> None:
    quantise_to_fp8(folder)
    edit_config(folder, quantization_config=None)
    error = refused(folder, "nothing uses model.layers.0.mlp.down_proj.weight_scale_inv")
    assert "GGUF" in str(error.hint)


def test_a_quantisation_that_transformers_can_not_load_here(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fbgemm_fp8"})
    error = refused(folder, r"GPU .*\(its weights are quantised by fbgemm_fp8\)")
    assert "without quantisation" in str(error.hint)


# --- metadata ------------------------------------------------------------------------------------


def edit_json(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_an_architecture_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="xyz", transformers_version="6.4.0")
    error = refused(folder, "does not know the architecture 'xyz'; version 6.4.0 wrote")
    assert "pip install --upgrade transformers" in str(error.hint)


@pytest.mark.parametrize("name", ["T5Config", "BartConfig", "ViTConfig"])
def test_no_language_model_whatever_its_config_leaves_out(folder: Path, name: str) -> None:
    config = getattr(tf, name)()
    config.save_pretrained(folder)
    edit_config(folder, is_encoder_decoder=None, architectures=None)
    refused(folder, "is (an encoder-decoder model|not a causal language model)")


@pytest.mark.parametrize("changes", [{"hidden_size": "big"}, {"num_attention_heads": 5}])
def test_a_config_that_makes_no_model(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    error = refused(
        folder, "the config of the model mine can't be loaded: .*(expected int|multiple)"
    )
    assert "came with the weights" in str(error.hint)


def test_a_tokenizer_of_a_format_to_come(folder: Path) -> None:
    edit_json(folder, "tokenizer.json", lambda t: t["model"].update(type="NewKind"))
    error = refused(folder, "the tokenizer of the model mine can't be loaded: .*did not match")
    assert "pip install --upgrade tokenizers" in str(error.hint)


def test_a_tokenizer_cut_short(folder: Path) -> None:
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data[: len(data) // 2])
    assert "hf download" in str(refused(folder, "the tokenizer of the model mine").hint)


def test_a_tokenizer_class_that_is_not_known_is_read_by_its_json(folder: Path) -> None:
    edit_json(folder, "tokenizer_config.json", lambda t: t.update(tokenizer_class="XyzTokenizer"))
    assert load(folder).tokenizer("abc")["input_ids"]


def test_a_tokenizer_that_needs_a_package(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    edit_json(folder, "tokenizer_config.json", lambda t: t.update(tokenizer_class="LlamaTokenizer"))
    error = refused(folder, "the tokenizer of the model mine can't be loaded")
    assert "copy the tokenizer.json of the model that it was made from" in str(error.hint)


def test_a_file_that_broke_since_the_job_was_submitted_says_how(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match="incomplete: it has 130,495 bytes"):
        load(folder)


def test_whatever_a_reader_raises_is_about_the_model(folder: Path) -> None:
    for error in (Exception("odd"), TypeError("odd"), RecursionError("odd"), AssertionError("odd")):
        with (
            pytest.raises(ModelError, match=r"model mine can't be loaded: .*odd"),
            reading("mine", str(folder)),
        ):
            raise error


def test_but_memory_and_the_user_are_not(folder: Path) -> None:
    with pytest.raises(EngineError, match="no memory left for the weights"):  # noqa: SIM117
        with reading("mine", str(folder)):
            torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(MemoryError), reading("mine", str(folder)):
        mmap.mmap(-1, 1 << 62)
    for kind in (MemoryError, KeyboardInterrupt):
        with pytest.raises(kind), reading("mine", str(folder)):
            raise kind


# --- finite --------------------------------------------------------------------------------------


def broken(*values: tuple[str, float]) -> tf.PreTrainedModel:
    llama = build("llama")
    with torch.no_grad():
        for i, (name, value) in enumerate(values):
            llama.get_parameter(name).view(-1)[7 + i] = value
    return llama


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    whole.check_finite(build("llama").to(dtype))
    says = rf"damaged: {DOWN} has 1 value that is not finite"
    with pytest.raises(ModelError, match=says) as caught:
        whole.check_finite(broken((DOWN, value)).to(dtype))
    assert ("--dtype bfloat16" in str(caught.value.hint)) == (dtype == torch.float16)


def test_all_that_are_not_finite_are_counted() -> None:
    nan = float("nan")
    model = broken((DOWN, nan), (DOWN, nan), ("lm_head.weight", nan), ("model.norm.weight", nan))
    with pytest.raises(ModelError) as caught:
        whole.check_finite(model)
    assert f"{DOWN} has 2 values that are not finite" in str(caught.value)
    assert "lm_head.weight has 1 value" in str(caught.value)


def test_the_last_value_of_a_large_tensor_counts() -> None:
    linear = torch.nn.Linear(1500, 1500)  # in pieces, the last one uneven
    whole.check_finite(linear)
    with torch.no_grad():
        linear.weight.view(-1)[-1] = float("nan")
    with pytest.raises(ModelError, match="weight has 1 value"):
        whole.check_finite(linear)


def test_weights_of_8_bits_are_looked_at_too() -> None:
    model = broken((DOWN, float("nan")))
    int8_weights(model)
    with pytest.raises(ModelError, match=r"down_proj\.scales"):
        whole.check_finite(model)
    small = torch.nn.Module()
    small.weight = torch.nn.Parameter(torch.ones(9).to(torch.float8_e4m3fn), requires_grad=False)
    whole.check_finite(small)
    small.weight.data.view(torch.uint8)[4] = 0x7F
    with pytest.raises(ModelError, match="weight has 1 value"):
        whole.check_finite(small)


def test_what_float16_can_not_hold_is_found(folder: Path) -> None:
    edit_weights(folder, lambda weights: {**weights, DOWN: weights[DOWN] * 1e7})
    whole.check_finite(load(folder).model)
    model = loading.load(str(folder), dtype="float16").model
    with pytest.raises(ModelError, match="not finite") as caught:
        whole.check_finite(model)
    assert "--dtype bfloat16 or --dtype float32" in str(caught.value.hint)
