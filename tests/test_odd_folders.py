"""Folders with things in the places of files, and heads of GGUF files that say what can't be."""

from __future__ import annotations

import os
import socket
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchrun.engine.model import loading
from batchrun.errors import ModelError
from batchrun.models.gguf import check_gguf
from batchrun.models.resolve import chat_templates, resolve
from batchrun.prompts.control_tokens import ControlTokens
from tests.tiny import write_tiny_gguf, write_tiny_model


def as_fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def as_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def as_loop(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.name)


def as_socket(file: Path) -> None:
    file.unlink(missing_ok=True)
    here = Path.cwd()
    os.chdir(file.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(file.name)
    os.chdir(here)


def as_text(text: bytes) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_bytes(text)

    return write


INSTEAD: dict[str, Callable[[Path], None]] = {
    "a pipe": as_fifo,
    "a folder": as_folder,
    "a link to itself": as_loop,
    "a socket": as_socket,
    "nothing": as_text(b""),
    "zeros": as_text(bytes(4096)),
    "a mark of its encoding": as_text(b"\xef\xbb\xbf{}"),
    "UTF-16": as_text("{}".encode("utf-16")),
    "no UTF-8": as_text(b'{"a": "\xff"}'),
    "lists in lists": as_text(b'{"a": ' + b"[" * 100_000),
    "objects in objects": as_text(b'{"a":' * 100_000),
    "a long number": as_text(b'{"num_hidden_layers": ' + b"9" * 5000 + b"}"),
    "a list": as_text(b"[]"),
    "null": as_text(b"null"),
}
FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_tiny_model(tmp_path_factory.mktemp("saved"), layers=1)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Whoever waits for what never comes is woken."""
    import signal  # noqa: PLC0415

    def ring(*_: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("instead", INSTEAD)
def test_what_is_no_file_is_refused_or_of_no_account(
    saved: dict[str, bytes], instead: str, tmp_path: Path
) -> None:
    for name in FILES:
        folder = tmp_path / name
        folder.mkdir()
        for other, content in saved.items():
            (folder / other).write_bytes(content)
        INSTEAD[instead](folder / name)
        with alarm(100):
            try:
                ref = resolve(str(folder), tmp_path / "cache")
                chat_templates(ref.path)
                loading.load(str(ref.path), name="mine", dtype="float32")
            except ModelError as error:
                assert error.hint or "no config.json" in str(error)  # noqa: PT017
            else:
                assert name not in {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_control_token_of_many_characters_takes_no_memory(
    saved: dict[str, bytes], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    for other, content in saved.items():
        (tmp_path / other).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, pad_token="x" * 10_000)
    tracemalloc.start()
    control = ControlTokens(tokenizer)
    text = "ends with " + "x" * 10
    assert control.put(text) != text
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


# --- heads of GGUF -------------------------------------------------------------------------------

SIZES = {0: (1, 4), 8: (32, 34)}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(tensors: int, *entries: bytes, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, len(entries)) + b"".join(entries)


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<IQ", 10, value)


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


LLAMA = text("general.architecture") + struct.pack("<I", 8) + text("llama")
HEADS = {
    "a version to come": (head(0, version=9), "its version is 9"),
    "more entries than bytes": (head(1 << 60), "ends within its header"),
    "a text longer than the file": (head(0, struct.pack("<Q", 1 << 62)), "ends within its header"),
    "a list longer than the file": (
        head(0, text("a") + struct.pack("<IIQ", 9, 4, 1 << 62)),
        "ends within its header",
    ),
    "lists in lists": (
        head(0, text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50),
        "has the type 9",
    ),
    "a type to come": (head(0, text("a") + struct.pack("<I", 77)), "has the type 77"),
    "a key twice": (head(0, number("a", 1), number("a", 2)), "its key 'a' appears twice"),
    "an alignment of 0": (head(0, number("general.alignment", 0)), "its alignment is 0"),
    "an alignment of 3": (head(0, number("general.alignment", 3)), "its alignment is 3"),
    "layers without end": (
        head(1, LLAMA, number("llama.block_count", 1 << 31)) + tensor("t", 4) + bytes(64),
        "'llama.block_count' is 2147483648, but has 1 tensors",
    ),
    "no number of layers": (
        head(1, LLAMA, number("lama.block_count", 1)) + tensor("t", 4) + bytes(64),
        "'llama.block_count' is None, but has 1 tensors",
    ),
    "a tensor twice": (head(2) + tensor("t", 4) + tensor("t", 4), "appears twice"),
    "a tensor without end": (head(1) + tensor("t", 1 << 40), "it is incomplete"),
    "a tensor of a type to come": (head(1) + tensor("t", 4, kind=99), "has the type 99"),
    "a tensor of many dimensions": (head(1) + tensor("t", *[1] * 9), "or has too many dimensions"),
    "a tensor far behind": (head(1) + tensor("t", 4, offset=1 << 60), "it is incomplete"),
    "a part": (
        head(0, text("split.count") + struct.pack("<IH", 2, 3)),
        "it is part 1 of 3 of a model",
    ),
}


@pytest.mark.parametrize("what", HEADS)
def test_a_head_of_gguf_that_can_not_be_is_told(what: str, tmp_path: Path) -> None:
    data, says = HEADS[what]
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=says) as caught:
        check_gguf(file, SIZES)
    assert caught.value.hint


def test_a_sound_head_of_gguf_lists_its_tensors(tmp_path: Path) -> None:
    stored = check_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), SIZES)
    assert stored["blk.0.ffn_down.weight"].shape == (64, 32)
    assert stored["output_norm.weight"].nbytes == 128
