"""`--model`: what resolves to what, what is refused, and that converted models are exact."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from batchrun.errors import ModelError
from batchrun.models.resolve import fingerprint, resolve
from tests.tiny import edit_config, write_tiny_gguf, write_tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def tiny(saved, tmp_path):
    """A copy of the tiny model that a test may change."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny-8.gguf")


def test_importing_models_imports_neither_torch_nor_transformers():
    code = (
        "import batchrun.models.resolve, sys; print({'torch', 'transformers'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_a_folder_resolves_to_itself(tiny, tmp_path):
    ref = resolve(str(tiny), tmp_path / "cache")
    assert (ref.name, ref.path) == (str(tiny), tiny)
    assert not (tmp_path / "cache").exists()


def test_the_fingerprint_follows_the_content_and_not_the_path(tiny, saved, tmp_path):
    assert fingerprint(tiny) == fingerprint(saved)
    (tiny / "README.md").write_text("nothing that changes an answer")
    assert fingerprint(tiny) == fingerprint(saved)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_fingerprint_sees_a_change_in_any_small_file(tiny, name):
    before = fingerprint(tiny)
    with (tiny / name).open("a") as file:
        file.write("\n")
    assert fingerprint(tiny) != before


def test_the_fingerprint_sees_other_weights_of_the_same_shape(tiny, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=8)
    assert (other / "config.json").read_bytes() == (tiny / "config.json").read_bytes()
    assert fingerprint(other) != fingerprint(tiny)


def test_pickles_only_are_refused_by_name(tiny, tmp_path):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)") as caught:
        resolve(str(tiny), tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_remote_code_needs_the_switch(tiny, tmp_path):
    edit_config(tiny, auto_map={"AutoConfig": "own.Config"}, model_type="of-its-own")
    with pytest.raises(ModelError, match="'of-its-own' model whose Python code") as caught:
        resolve(str(tiny), tmp_path)
    assert "--trust-remote-code" in caught.value.hint
    assert resolve(str(tiny), tmp_path, trust_remote_code=True).path == tiny


def test_an_architecture_that_transformers_knows_needs_no_switch(tiny, tmp_path):
    edit_config(tiny, auto_map={"AutoConfig": "own.Config"})
    assert resolve(str(tiny), tmp_path).path == tiny


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .*safetensors weights"),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_missing(tiny, tmp_path, break_it, message):
    break_it(tiny)
    with pytest.raises(ModelError, match=message):
        resolve(str(tiny), tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "gone.gguf", "two words"])
def test_an_unknown_path_says_what_was_tried(name, tmp_path):
    with pytest.raises(ModelError, match=r"no file or folder is at .* nor a hub id") as caught:
        resolve(name, tmp_path)
    assert "smollm2-135m-instruct" in caught.value.hint


def test_a_file_that_is_no_gguf_is_refused(tiny, tmp_path):
    with pytest.raises(ModelError, match=r"single .safetensors file") as caught:
        resolve(str(tiny / "model.safetensors"), tmp_path)
    assert str(tiny) in caught.value.hint


# --- GGUF ----------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_the_very_weights_that_it_holds(gguf_file, tmp_path):
    from gguf import GGUFReader, quants  # noqa: PLC0415
    from safetensors.numpy import load_file  # noqa: PLC0415

    ref = resolve(str(gguf_file), tmp_path)
    weights = load_file(ref.path / "model.safetensors")
    stored = {
        t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(gguf_file).tensors
    }
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        weights["model.layers.0.mlp.down_proj.weight"], stored["blk.0.ffn_down.weight"]
    )
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], stored["token_embd.weight"])
    assert "quantization_config" not in json.loads((ref.path / "config.json").read_text())


def test_a_second_time_nothing_is_converted_and_the_folder_is_the_same_model(gguf_file, tmp_path):
    said = []
    first = resolve(str(gguf_file), tmp_path, log=said.append)
    written = (first.path / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(gguf_file), tmp_path, log=said.append) == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == written
    assert len(said) == 1
    assert resolve(str(first.path), tmp_path).fingerprint == first.fingerprint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_converted_model_that_others_may_have_put_there_is_refused(gguf_file, tmp_path):
    models = tmp_path / "models"
    ref = resolve(str(gguf_file), models)
    assert models.stat().st_mode & 0o777 == ref.path.stat().st_mode & 0o777 == 0o700
    models.chmod(0o777)
    assert resolve(str(gguf_file), models) == ref
    assert models.stat().st_mode & 0o777 == 0o700
    os.chown(ref.path / "model.safetensors", 4321, 4321)
    with pytest.raises(ModelError, match=r"model\.safetensors, .* belongs to user 4321") as refused:
        resolve(str(gguf_file), models)
    assert f"rm -r '{ref.path}'" in refused.value.hint
    models.chmod(0o2770)  # shared: the group is trusted
    assert resolve(str(gguf_file), models) == ref


def test_what_a_killed_conversion_left_is_replaced(gguf_file, tmp_path):
    expected = resolve(str(gguf_file), tmp_path / "a")
    left = tmp_path / "b" / f"{expected.path.name}.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    ref = resolve(str(gguf_file), tmp_path / "b")
    weights = [folder / "model.safetensors" for folder in (ref.path, expected.path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not left.exists()


def test_processes_that_race_agree(gguf_file, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        refs = pool.map(partial(resolve, cache_dir=tmp_path), [str(gguf_file)] * 3)
    assert len(set(refs)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", refs[0].path.name]


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_a_truncated_gguf_file_is_refused_and_leaves_nothing(gguf_file, tmp_path, share):
    data = gguf_file.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"cannot read the GGUF file .*broken.gguf"):
        resolve(str(broken), tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_unknown_splitting_rule_is_refused(tmp_path):
    file = write_tiny_gguf(tmp_path / "other.gguf", pre="a-rule-of-its-own")
    with pytest.raises(ModelError, match="pre-tokenizer 'a-rule-of-its-own'") as caught:
        resolve(str(file), tmp_path)
    assert "safetensors" in caught.value.hint


def test_the_embedded_model_splits_digits_as_it_was_trained(tokenizer):
    # Two spaces before a digit are one token in SmolLM2's own tokenizer. Read without its
    # splitting rule, the file's vocabulary would give two.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  57")["input_ids"]) == ["a", "ĠĠ", "5", "7"]
    assert tokenizer("<|im_start|>user\nHi<|im_end|>\n")["input_ids"] == [
        1,
        4093,
        198,
        26843,
        2,
        198,
    ]


def test_the_embedded_model_answers_and_ends_its_turn(smollm2, tokenizer):
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(smollm2.path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    answer = output[inputs["input_ids"].shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


# --- the hub, as a real server that knows three models -------------------------------------------


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        status, code, body = 404, "RepoNotFound", {}
        if "pickles" in self.path:
            files = [{"rfilename": name} for name in ("config.json", "pytorch_model.bin")]
            status, code, body = 200, "", {"id": "org/pickles", "siblings": files}
        elif "gated" in self.path:
            status, code = 403, "GatedRepo"
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def resolve_in_process(name, cache, **environment):
    code = (
        "import sys; from pathlib import Path; from batchrun.models.resolve import *\n"
        "try: resolve(sys.argv[1], Path(sys.argv[2]))\n"
        "except ModelError as error: print(error, '|', error.hint)"
    )
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment}
    env |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    shown = subprocess.run(
        [sys.executable, "-c", code, name, str(cache)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    return shown.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/missing", "the hub shows no model org/missing | check the spelling"),
        ("org/pickles", "org/pickles has only pickled weights (pytorch_model.bin)"),
        ("org/gated", "org/gated is gated"),
    ],
)
def test_what_the_hub_says_is_told(hub, name, message, tmp_path):
    assert message in resolve_in_process(name, tmp_path, HF_ENDPOINT=hub)


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
    shown = resolve_in_process("org/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "no model 'org/model': no local file or folder, not the alias" in shown
    assert "the hub cannot be reached" in shown
