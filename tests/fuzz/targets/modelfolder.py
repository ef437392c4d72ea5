"""A model's folder with one damaged file: refused, or it computes what transformers computes.

Each kind of file is a target of its own. What is done with a folder is what submit and a run do.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from batchrun.engine.core import EngineError
from batchrun.errors import ModelError
from tests.fuzz.mutate import Mutate, damaged, json_damaged
from tests.fuzz.trial import Target, Wrong
from tests.tiny import shard_weights, write_tiny_gguf, write_tiny_model

QUICK = 4  # mutants of each kind in `make test`: a run of a model takes 80 ms
MEMORY = 1 << 30  # bytes: 256 MiB of weights may be made before they are compared
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_BESIDE = {  # files that a tiny model does without
    "special_tokens_map.json": _TOKENS,
    "added_tokens.json": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2},
    "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "nowhere", "r": 8},
}
_TEXTS = ("Hello <|im_end|>", "\u00e9")


@cache
def models() -> dict[str, dict[str, bytes]]:
    """The files of tiny models, by name. Loads torch and transformers, before any fork."""
    import torch  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        plain, sharded = Path(scratch, "plain"), Path(scratch, "sharded")
        write_tiny_model(plain, layers=1)
        write_tiny_model(sharded, layers=1)
        shard_weights(sharded)
        file = write_tiny_gguf(Path(scratch, "tiny.gguf"))
        found = {
            "plain": {file.name: file.read_bytes() for file in plain.iterdir()},
            "sharded": {file.name: file.read_bytes() for file in sharded.iterdir()},
            "gguf": {file.name: file.read_bytes()},
        }
        run(plain, Path(scratch))  # so that no child has to import what it takes
    for name, content in _BESIDE.items():
        found["plain"].setdefault(name, json.dumps(content).encode())
    found["plain"]["generation_config.json"] = json.dumps(
        {"eos_token_id": [2], "max_length": 200, "stop_strings": ["###"], "temperature": 0.7}
    ).encode()
    found["rich"] = found["plain"] | {
        name: json.dumps({**json.loads(found["plain"][name]), **more}).encode()
        for name, more in _RICH.items()
    }
    return found


# What metadata may say beside what a tiny model needs.
_RICH: dict[str, dict[str, Any]] = {
    "config.json": {
        "auto_map": {"AutoConfig": "configuration_mine.Mine"},
        "attn_implementation": "sdpa",
        "id2label": {"0": "a", "1": "b"},
        "layer_types": ["full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        },
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, "normalized": False, "lstrip": False}
            for i, token in enumerate(_BESIDE["added_tokens.json"])
        },
        "extra_special_tokens": ["<|im_start|>"],
        "tokenizer_file": "/nowhere/tokenizer.json",
        "model_max_length": 10**30,
    },
    "generation_config.json": {
        "do_sample": True,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "bad_words_ids": [[5, 6], [7]],
        "sequence_bias": [[[9], -1.0]],
        "suppress_tokens": [11],
        "begin_suppress_tokens": [12],
        "no_repeat_ngram_size": 3,
        "forced_eos_token_id": 2,
        "exponential_decay_length_penalty": [4, 1.1],
        "min_length": 2,
        "max_new_tokens": 20,
    },
}


def _check(name: str) -> Callable[[str, bytes, Path], str]:
    """Puts a mutant of this file into its model's folder, and runs that."""

    def check(model: str, data: bytes, scratch: Path) -> str:
        files = models()[model]
        folder = scratch / "model"
        folder.mkdir()
        for other, content in files.items():
            if other not in _BESIDE or other == name:
                (folder / other).write_bytes(data if other == name else content)
        if model == "gguf":
            folder = folder / name
        return run(folder, scratch)

    return check


def check_adapter(model: str, data: bytes, scratch: Path) -> str:
    """Where there is an adapter's config, whatever it says, the folder is refused for it."""
    try:
        return _check("adapter_config.json")(model, data, scratch)
    except ModelError as error:
        if "adapter" not in str(error):
            raise Wrong(str(error)) from error
        return "told"


def run(model: Path, scratch: Path) -> str:
    """What submit and a run do with a model, up to the first tokens.

    Raises:
        ModelError: It is refused.
        EngineError: There is no memory for it.
        Wrong: It computes something else than transformers does.
    """
    from batchrun.engine.build import build  # noqa: PLC0415
    from batchrun.engine.core import Request  # noqa: PLC0415
    from batchrun.engine.settings import Settings  # noqa: PLC0415
    from batchrun.models.resolve import chat_templates, resolve  # noqa: PLC0415
    from batchrun.prompts.messages import PromptError  # noqa: PLC0415

    ref = resolve(str(model), scratch / "models")
    no_template = chat_templates(ref.path) == []
    settings = Settings(
        model_path=str(ref.path),
        model_name="mine",
        fingerprint=ref.fingerprint,
        cache=scratch / "verdicts",
        dtype="float32",
        device="cpu",
        attention="sdpa",
        max_num_seqs=2,
        kv_budget=4 << 20,
        optimize=False,  # which packs weights
    )
    with build(settings, {"chat": True}, lambda _: None) as runtime:
        if no_template:
            raise Wrong("a chat template appears that the files do not have")
        for row, text in enumerate(_TEXTS):
            try:
                prompt = runtime.encode({"prompt": text})
                params = runtime.generation.params({"max_tokens": 3})
                params = runtime.generation.fitted(params, {"max_tokens": 3}, len(prompt))
            except (PromptError, ValueError):  # an error of that row
                continue
            runtime.engine.add(Request(row, 0, prompt, params, 0))
        while runtime.engine.has_work:
            runtime.engine.step()
        _same_weights(runtime.loaded.model, ref.path)
    return "runs"


def _same_weights(model: Any, folder: Path) -> None:
    """The model has the very numbers of the files."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load(file.read_bytes())
    for name, tensor in model.state_dict().items():
        want = stored.get(name, stored.get("model.embed_tokens.weight"))
        if want is None or not torch.equal(tensor, want.to(tensor.dtype)):
            raise Wrong(f"{name} has other numbers than its file")


def header_damaged(seed: bytes, rng: Random) -> bytes:
    """A safetensors file with damage to its header, whose length is told; now and then to all."""
    if rng.random() < 0.3:
        return damaged(seed, rng)
    (length,) = struct.unpack("<Q", seed[:8])
    header = json_damaged(seed[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + seed[8 + length :]


def head_damaged(seed: bytes, rng: Random) -> bytes:
    """A GGUF file with damage to what comes before its weights."""
    head = 12_000
    if rng.random() < 0.1:
        return damaged(seed, rng)
    return damaged(seed[:head], rng) + seed[head:]


def _target(kind: str, name: str, mutate: Mutate, *of: str) -> Target:
    def seeds(_: Path) -> dict[str, bytes]:
        return {model: models()[model][name] for model in of or ("plain", *_richer(name))}

    return Target(kind, seeds, _check(name), (ModelError, EngineError), mutate, MEMORY, QUICK)


def _richer(name: str) -> list[str]:
    return ["rich"] if name in _RICH else []


def jinja_damaged(seed: bytes, rng: Random) -> bytes:
    """A chat template with damage, or with something that templates from elsewhere might do."""
    if rng.random() < 0.6:
        return damaged(seed, rng)
    at = rng.randrange(len(seed) + 1)
    return seed[:at] + rng.choice(_TEMPLATES) + seed[at:]


_TEMPLATES = [
    b"{% include '/etc/passwd' %}",
    b"{{ ''.__class__.__mro__ }}",
    b"{{ cycler.__init__.__globals__.os.system('true') }}",
    b"{{ raise_exception('no') }}",
    b"{{ 1 // 0 }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    b"{{ messages[7]['x'].y }}",
    b"{{ messages | tojson }}",
    b"{% set messages = [] %}",
    b"{{ '%s' % messages }}",
    b"{{ none + 1 }}",
    b"{% if true %}",
]

TARGETS = [
    _target("config", "config.json", json_damaged),
    _target("tokenizer", "tokenizer.json", json_damaged),
    _target("tokenizer_config", "tokenizer_config.json", json_damaged),
    _target("generation_config", "generation_config.json", json_damaged),
    _target("special_tokens_map", "special_tokens_map.json", json_damaged),
    _target("added_tokens", "added_tokens.json", json_damaged),
    replace(
        _target("adapter_config", "adapter_config.json", json_damaged),
        check=check_adapter,
    ),
    _target("chat_template", "chat_template.jinja", jinja_damaged),
    _target("safetensors", WEIGHTS, header_damaged),
    _target("safetensors_index", INDEX, json_damaged, "sharded"),
    _target("gguf", "tiny.gguf", head_damaged, "gguf"),
]
