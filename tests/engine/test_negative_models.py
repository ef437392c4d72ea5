"""Each tensor of a model dropped, renamed, reshaped, or with a number in it that is none."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchrun.engine.model import gates, loading
from batchrun.engine.model.prepare import LoadedModel
from batchrun.errors import ModelError
from batchrun.models import whole
from batchrun.models.folder import INDEX, SINGLE
from batchrun.models.resolve import resolve
from tests.parity.models import CONFIGS, seeded
from tests.tiny import edit_config, shard_weights, write_tiny_model, write_tokenizer

Change = Callable[[dict[str, torch.Tensor], str], Any]


def llama(folder: Path) -> None:
    write_tiny_model(folder, layers=1)


def tied(folder: Path) -> None:
    write_tiny_model(folder, layers=1)
    weights = load_file(folder / SINGLE)
    del weights["lm_head.weight"]
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    edit_config(folder, tie_word_embeddings=True)


def experts(folder: Path) -> None:
    config = copy.deepcopy(CONFIGS["qwen3-moe"])
    config.num_hidden_layers, config.num_experts = 1, 2
    seeded(config).save_pretrained(folder)
    write_tokenizer(folder)


def sharded(folder: Path) -> None:
    llama(folder)
    shard_weights(folder)


KINDS = {"tied": tied, "experts": experts, "sharded": sharded}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](folder)
    return folder


def dropped(weights: dict[str, torch.Tensor], name: str) -> None:
    del weights[name]


def renamed(weights: dict[str, torch.Tensor], name: str) -> None:
    weights["x." + name] = weights.pop(name)


def reshaped(weights: dict[str, torch.Tensor], name: str) -> None:
    was = weights[name]
    weights[name] = torch.cat([was, was[:1]])


def not_finite(weights: dict[str, torch.Tensor], name: str) -> None:
    numbers = weights[name].view(-1)
    numbers[len(numbers) // 2] = float("-inf" if "norm" in name else "nan")


CHANGES: list[Change] = [dropped, renamed, reshaped, not_finite]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_any_tensor_is_refused_by_its_name(
    model: Path, change: Change, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    tried = 0
    for file in sorted(folder.glob("*.safetensors")):
        sound = load_file(file)
        for name in sound:
            weights = {key: tensor.clone() for key, tensor in sound.items()}
            change(weights, name)
            save_file(weights, file, metadata={"format": "pt"})
            with pytest.raises(ModelError) as caught:
                run(folder)
            said = str(caught.value)
            assert any(called in said for called in names(name, change)), (name, said)
            assert caught.value.hint
            tried += 1
        save_file(sound, file, metadata={"format": "pt"})
    run(folder)
    assert tried > 8


def names(name: str, change: Change) -> set[str]:
    """What a message may call a tensor: of its experts a model makes one of each kind."""
    layer, experts, part = name.partition(".experts.")
    if not experts:
        return {name}
    kind = part.partition(".")[2].removesuffix(".weight")
    return {name, layer + experts + ("" if change in {not_finite, reshaped} else kind)}


def run(folder: Path) -> LoadedModel:
    """What submit and a run do with weights before there is an engine."""
    resolve(str(folder), folder / "cache")
    loaded = loading.load(str(folder), name="mine", dtype="float32")
    whole.check_finite(loaded.model)
    return loaded


def test_an_index_without_a_tensor_does_not_hide_it(tmp_path: Path) -> None:
    """transformers loads all that is in the files, and the index only says where they are."""
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    run(tmp_path)


HUGE = 10**9
OTHERS: list[dict[str, object]] = [
    {"num_hidden_layers": HUGE},
    {"num_hidden_layers": 1000},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 2.5},
    {"num_hidden_layers": None, "layer_types": 7},
    {"num_labels": HUGE},
    {"vocab_size": 10**12},
    {"vocab_size": 0},
    {"vocab_size": -5},
    {"vocab_size": 1 << 80},
    {"hidden_size": -1},
    {"hidden_size": 0},
    {"hidden_size": 10**12},
    {"hidden_size": "32"},
    {"intermediate_size": 10**12},
    {"head_dim": 7},
    {"head_dim": 0},
    {"head_dim": 10**12},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"num_attention_heads": HUGE},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 0},
    {"num_key_value_heads": -2},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": -1},
    {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "much"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    {"rope_parameters": {"rope_type": "of no kind", "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": float("nan")}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 10**400}},
    {"rope_parameters": [1, 2]},
    {"rms_norm_eps": "small"},
    {"rms_norm_eps": float("nan")},
    {"hidden_act": "of_no_kind"},
    {"hidden_act": 7},
    {"dtype": "load"},
    {"dtype": "of_no_kind"},
    {"model_type": "of_no_kind"},
    {"model_type": ["llama"]},
    {"architectures": {"a": 1}},
    {"text_config": {"num_hidden_layers": HUGE}},
    {"tie_word_embeddings": "perhaps"},
    {"is_encoder_decoder": True},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("plain"), layers=1)


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_a_config_of_another_model_is_refused_before_it_is_built(
    plain: Path, changes: dict[str, object], tmp_path: Path
) -> None:
    folder = shutil.copytree(plain, tmp_path / "model")
    edit_config(folder, **changes)
    with pytest.raises(ModelError) as caught:
        gates.reference(run(folder))
    assert caught.value.hint
    assert str(caught.value).isprintable()
