"""Whatever lies in a model's folder: nothing of it is run, and nothing beside it is read."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchrun.errors import ModelError
from batchrun.models.resolve import fingerprint, resolve
from tests.tiny import edit_config, write_tiny_gguf, write_tiny_model

SCRIPT = """
import sys, traceback
from pathlib import Path

SCRATCH, *MODELS = sys.argv[1:]
seen = open(SCRATCH + "/audit", "w")

def audit(event, args):
    if event == "open" and isinstance(args[0], str):
        seen.write(f"open {args[0]}\\n")
    elif event in {"pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"}:
        seen.write(f"{event} {args[:2]}\\n")

from batchrun.engine.model import gates, loading
from batchrun.engine.model.generation import read_generation
from batchrun.prompts.builder import prompt_builder
from batchrun.models.resolve import resolve
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.addaudithook(audit)
for model in MODELS:
    ref = resolve(model, Path(SCRATCH, "models"))
    loaded = loading.load(str(ref.path), name="mine", dtype="float32")
    most = loaded.max_model_len
    encode = prompt_builder(loaded.tokenizer, {"chat": True}, max_model_len=most, model="mine")
    assert encode({"prompt": "a"})
    read_generation(loaded.model, loaded.tokenizer, loaded.max_model_len)
    gates.reference(loaded)
"""


class Sentinel:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def lay_traps(folder: Path, outside: Path, mark: Path) -> None:
    """Everything in a folder and its settings that some loader somewhere runs or follows."""
    for name in (
        "pytorch_model.bin",
        "pytorch_model-00001-of-00001.bin",
        "adapter_model.bin",
        "model.pt",
        "model.pth",
        "model.ckpt",
        "consolidated.00.pth",
        "tokenizer.pkl",
        "optimizer.pt",
        "training_args.bin",
        ".metadata",
        "flax_model.msgpack",
        "tf_model.h5",
        "rust_model.ot",
    ):
        (folder / name).write_bytes(pickle.dumps(Sentinel(mark)))
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "pytorch_model-00001-of-00001.bin"}})
    )
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    (folder / "custom_generate").mkdir()
    for name in (
        "custom_generate/generate.py",
        "modeling_mine.py",
        "configuration_mine.py",
        "tokenization_mine.py",
        "pipeline_mine.py",
        "__init__.py",
        "setup.py",
        "sitecustomize.py",
        "transformers.py",
        "torch.py",
        "conftest.py",
    ):
        (folder / name).write_text(code)
    (folder / "custom_generate" / "requirements.txt").write_text("nothing-of-the-kind\n")
    edit_config(
        folder,
        auto_map={
            "AutoConfig": "configuration_mine.Mine",
            "AutoModelForCausalLM": "modeling_mine.Mine",
            "AutoTokenizer": ["tokenization_mine.Mine", None],
        },
        custom_pipelines={"text-generation": {"impl": "pipeline_mine.Mine", "pt": ["Mine"]}},
        attn_implementation="nobody/kernels",
        _attn_implementation="nobody/kernels",
        experts_implementation="nobody/kernels",
        custom_generate="nobody/generate",
        name_or_path="/nowhere",
        _name_or_path="/nowhere",
        tokenizer_class="Mine",
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "vocab_file": str(outside / "vocab.json"),
        "merges_file": "../outside/merges.txt",
        "tokenizer_file": str(outside / "tokenizer.json"),
        "special_tokens_map_file": str(outside / "special_tokens_map.json"),
        "chat_template_file": str(outside / "chat_template.jinja"),
        "added_tokens_file": str(outside / "added_tokens.json"),
        "gguf_file": str(outside / "other.gguf"),
        "tekken_file": str(outside / "tekken.json"),
        "name_or_path": str(outside),
        "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = {"cache_implementation": "static", "custom_generate": "nobody/x", "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(asked))


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Another model of which nothing may be read."""
    folder = tmp_path / "outside"
    write_tiny_model(folder, layers=1, seed=8)
    for name in ("vocab.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"):
        (folder / name).write_text("{}")
    (folder / "merges.txt").write_text("a b\n")
    write_tiny_gguf(folder / "other.gguf")
    return folder


def opened(scratch: Path, *models: Path) -> list[str]:
    """Loads models in a process of its own; which files that opened, by kernel and by Python."""
    trace = scratch / "trace"
    command = [sys.executable, "-P", "-c", SCRIPT, str(scratch), *map(str, models)]
    if shutil.which("strace"):  # readers in Rust tell no audit hook
        strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=open,openat,execve"]
        command = [*strace, "-o", str(trace), *command]
    cwd = models[0]
    shown = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr[-3000:]
    lines = (scratch / "audit").read_text().splitlines()
    assert not [line for line in lines if not line.startswith("open ")]
    paths = [line.removeprefix("open ") for line in lines]
    if trace.exists():
        calls = [c for c in trace.read_text().splitlines() if not c.endswith(("ENOENT", ")"))]
        paths += [c.split('"')[1] for c in calls if c.count('"') >= 2 and "= -1" not in c]
    return [str(Path(cwd, path)) for path in paths]


def test_nothing_in_a_folder_is_run_and_nothing_beside_it_is_read(
    outside: Path, tmp_path: Path
) -> None:
    folder, mark = write_tiny_model(tmp_path / "model", layers=1), tmp_path / "mark"
    lay_traps(folder, outside, mark)
    beside = shutil.copytree(folder, tmp_path / "beside")
    file = write_tiny_gguf(beside / "own.gguf")
    paths = opened(tmp_path, folder, file)
    assert not mark.exists()
    assert not [path for path in paths if str(outside) in path]
    # A GGUF file is read alone.
    assert {Path(path) for path in paths if beside in Path(path).parents} == {file}
    inside = {Path(path) for path in paths if Path(path).is_file() and folder in Path(path).parents}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in inside}
    for file in inside:  # what is read is what a fingerprint is made of
        before, data = fingerprint(folder), file.read_bytes()
        file.write_bytes(data + b" ")
        assert fingerprint(folder) != before, file
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0/../../x.json"]}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["/tmp/tokenizer.4.0.0.json"]}),
        ("tokenizer_config.json", {"init_inputs": ["/tmp/tokenizer.json"]}),
        ("special_tokens_map.json", {"tokenizer_file": "/tmp/tokenizer.json"}),
        ("special_tokens_map.json", {"vocab": "/tmp/vocab.json"}),
    ],
)
def test_a_tokenizer_that_is_read_from_elsewhere_is_refused(
    tmp_path: Path, name: str, content: dict[str, object]
) -> None:
    folder = write_tiny_model(tmp_path / "model", layers=1)
    file = folder / name
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**settings, **content}))
    with pytest.raises(ModelError, match=f"{name} says to read the tokenizer from elsewhere"):
        resolve(str(folder), tmp_path / "cache")
