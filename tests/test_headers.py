"""Headers and indexes of safetensors: what is wrong with them is told when a job is submitted."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchrun.errors import ModelError
from batchrun.models.files import stored_in
from batchrun.models.folder import INDEX, SINGLE
from batchrun.models.resolve import fingerprint, resolve
from tests.tiny import edit_config, shard_weights, write_tiny_model

Header = dict[str, Any]
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("saved"), layers=1)


@pytest.fixture(scope="module")
def saved_shards(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("shards") / "tiny")
    shard_weights(folder)
    return folder


@pytest.fixture
def tiny(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def shards(saved_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_shards, tmp_path / "sharded")


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        resolve(str(folder), folder.parent / "cache")
    assert caught.value.hint


# --- headers -------------------------------------------------------------------------------------


def edit_header(file: Path, change: Callable[[Header], Any]) -> None:
    """Writes what `change` makes of a header, or the text that it returns."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    made = change(header)
    text = made if isinstance(made, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_header_lists_the_tensors_of_its_file(saved: Path) -> None:
    stored = stored_in(saved / SINGLE)
    assert (stored[NORM].dtype, stored[NORM].shape, stored[NORM].nbytes) == ("F32", (32,), 128)
    assert sum(t.elements for t in stored.values()) * 4 == sum(t.nbytes for t in stored.values())


def shifted(header: Header) -> None:
    header[NORM]["data_offsets"] = [n - 4 for n in header[NORM]["data_offsets"]]


WRONG: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no JSON": (lambda _: b"{", "its header can't be read"),
    "no object": (lambda _: b"[1]", "its header can't be read"),
    "nested deeply": (lambda _: b"[" * 100_000, "its header can't be read"),
    "a name twice": (
        lambda h: json.dumps(h).encode().replace(b'"model.norm.weight"', b'"lm_head.weight"'),
        "'lm_head.weight' appears twice",
    ),
    "a type to come": (lambda h: h[NORM].update(dtype="F1"), "F1"),
    "no type": (lambda h: h[NORM].pop("dtype"), "KeyError: 'dtype'"),
    "another shape": (lambda h: h[NORM].update(shape=[33]), "damaged"),
    "a negative shape": (lambda h: h[NORM].update(shape=[-32]), "damaged"),
    "a shape beyond 64 bits": (lambda h: h[NORM].update(shape=[1 << 40, 1 << 40]), "damaged"),
    "a type of another size": (lambda h: h[NORM].update(dtype="F16"), "damaged"),
    "offsets that overlap": (shifted, "damaged|should have"),
    "offsets that are none": (lambda h: h[NORM].update(data_offsets=["a", "b"]), "be read"),
    "offsets beyond the file": (lambda h: h[NORM].update(data_offsets=[0, 1 << 50]), "should have"),
    "a gap": (lambda h: h.pop(NORM), "damaged|should have"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_header_that_is_wrong_is_refused_at_submit(tiny: Path, wrong: str) -> None:
    change, says = WRONG[wrong]
    edit_header(tiny / SINGLE, change)
    refused(tiny, f"model.safetensors.*({says})")


def test_bytes_are_those_of_one_tensor_alone(tiny: Path) -> None:
    def same(header: Header) -> None:
        norms = ("input_layernorm", "post_attention_layernorm")
        first, second = (f"model.layers.0.{name}.weight" for name in norms)
        header[second]["data_offsets"] = header[first]["data_offsets"]

    edit_header(tiny / SINGLE, same)
    refused(tiny, "model.safetensors is damaged")


# --- the index -----------------------------------------------------------------------------------


def edit_index(folder: Path, change: Callable[[Any], Any]) -> None:
    file = folder / INDEX
    index = json.loads(file.read_text())
    made = change(index)
    file.write_text(json.dumps(index if made is None else made))


ELSEWHERE = [
    "pytorch_model.bin",
    "../outside.safetensors",
    "/etc/outside.safetensors",
    "sub/model.safetensors",
    "./model.safetensors",
    "..",
    "",
    ".safetensors/../../x.safetensors",
    "model.safetensors\n",
    "a\nb.safetensors",
    "\x1b[2J.safetensors",
    "a\0.safetensors",
    "\ud800.safetensors",
    "x" * 300 + ".safetensors",
    7,
    None,
    ["model.safetensors"],
]


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda name: ascii(name)[:30])
def test_weights_come_from_files_of_the_folder_alone(shards: Path, name: object) -> None:
    shutil.copy(next(shards.glob("model-*")), shards.parent / "outside.safetensors")
    edit_index(shards, lambda index: index["weight_map"].update({NORM: name}))
    refused(shards, "which is not the name of a safetensors file in that folder")


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "sub/a.safetensors", 7])
def test_so_do_weights_that_the_config_names(tiny: Path, name: object) -> None:
    edit_config(tiny, transformers_weights=name)
    refused(tiny, "which is not the name of a safetensors file in that folder")


def test_weights_that_the_config_names_are_the_ones_that_count(tiny: Path) -> None:
    (tiny / SINGLE).rename(tiny / "own.safetensors")
    edit_config(tiny, transformers_weights="own.safetensors")
    before = fingerprint(tiny)
    data = bytearray((tiny / "own.safetensors").read_bytes())
    data[-1] ^= 1
    (tiny / "own.safetensors").write_bytes(data)
    assert fingerprint(tiny) != before
    (tiny / "own.safetensors").unlink()
    refused(tiny, "lacks 1 of the 1 weight files that own.safetensors names")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("weight_map"), 'it has no "weight_map"'),
        (lambda index: index.pop("metadata"), 'or no "metadata"'),
        (lambda index: index.update(weight_map=["a"]), 'it has no "weight_map"'),
        (lambda _: ["a"], "holds a list, not a JSON object"),
        (lambda index: index["weight_map"].update(x="model-9.safetensors"), "lacks 1 of the"),
        (
            lambda index: index["weight_map"].update(x=index["weight_map"][NORM]),
            "lacks 1 of the 13 tensors that model.safetensors.index.json names: 'x'",
        ),
    ],
)
def test_an_index_that_is_wrong_is_refused_at_submit(
    shards: Path, change: Callable[[Any], Any], says: str
) -> None:
    edit_index(shards, change)
    refused(shards, says)


def test_of_a_tensor_that_is_there_twice_the_index_does_not_choose(shards: Path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    index = json.loads((shards / INDEX).read_text())["weight_map"]
    name = min(index, key=lambda tensor: index[tensor])
    last = shards / max(index.values())
    tensor = load_file(shards / index[name])[name]
    save_file({**load_file(last), name: tensor + 1}, last, metadata={"format": "pt"})
    refused(shards, f"'{name}' is in {index[name]}, but {last.name} has another tensor")


def test_a_training_checkpoint_beside_the_weights_is_not_silently_taken(tiny: Path) -> None:
    shutil.copy(tiny / SINGLE, tiny / "shard-00000-model-00001-of-00001.safetensors")
    refused(tiny, "checkpoint of distributed training beside its weights")


# --- what is read is what is fingerprinted -------------------------------------------------------


def test_links_as_in_the_cache_of_the_hub_are_followed(shards: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(shards.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    ref = resolve(str(snapshot), tmp_path / "cache")
    assert ref.fingerprint == fingerprint(shards)
    changed = (snapshot / max(f.name for f in shards.glob("model-*"))).resolve()
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    assert fingerprint(snapshot) != ref.fingerprint


def test_every_weight_file_and_template_is_in_the_fingerprint(shards: Path) -> None:
    (shards / "additional_chat_templates").mkdir()
    (shards / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (shards / "tokenizer.model.v3").write_bytes(b"pieces")
    names = [file for file in shards.rglob("*") if file.is_file()]
    for file in names:
        before, data = fingerprint(shards), file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert fingerprint(shards) != before, file
        file.write_bytes(data)


def test_a_folder_does_not_say_itself_which_model_it_is(tiny: Path) -> None:
    (tiny / "batchrun-model.json").write_text('{"fingerprint": "0123"}')
    assert fingerprint(tiny) != "0123"
