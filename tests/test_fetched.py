"""Models that are objects in a store."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchrun.errors import ModelError
from batchrun.models import fetched
from batchrun.models.resolve import fingerprint, resolve
from batchrun.objectstore.paths import ObjectPath, StoreError
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-1.5")


@pytest.fixture
def stored(s3, tiny):
    """The model in a bucket."""
    for file in tiny.rglob("*"):
        if file.is_file():
            s3.put(f"tiny-1.5/{file.relative_to(tiny)}", file.read_bytes())
    return s3.bucket / "tiny-1.5"


@pytest.fixture
def downloads(monkeypatch):
    """The names of files in the order they are downloaded."""
    names = []

    def download(path, to, real=fetched.download):
        names.append(path.name)
        real(path, to)

    monkeypatch.setattr(fetched, "download", download)
    return names


def test_a_folder_is_downloaded_once_and_is_the_same_model(stored, tiny, tmp_path, downloads):
    said = []
    found = resolve(str(stored), tmp_path, log=said.append)
    assert found.fingerprint == fingerprint(tiny)
    assert (found.name, found.path.parent) == (str(stored), tmp_path)
    assert found.path.name.startswith("tiny-1.5-")
    assert [line.partition(" (")[0] for line in said] == [f"downloading {stored}"]
    assert sorted(downloads) == sorted(file.name for file in found.path.iterdir())
    assert found.path.stat().st_mode & 0o077 == 0
    assert resolve(f"{stored}/", tmp_path, log=said.append).path == found.path
    assert len(said) == 1


def test_another_model_in_its_place_is_downloaded(stored, s3, tiny, tmp_path):
    first = resolve(str(stored), tmp_path)
    config = json.loads((tiny / "config.json").read_bytes())
    s3.put("tiny-1.5/config.json", json.dumps({**config, "rms_norm_eps": 0.25}).encode())
    second = resolve(str(stored), tmp_path)
    assert second.fingerprint != first.fingerprint
    assert first.path.is_dir()


def test_only_what_a_model_is_made_of_is_downloaded(stored, s3, tmp_path):
    for name in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        s3.put(f"tiny-1.5/{name}", b"x")
    for name in ("notes.pdf", "code.py", "logs/config.json", "chat_templates/rag.jinja"):
        s3.put(f"tiny-1.5/{name}", b"x")

    def names(path):
        return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}

    plain = names(resolve(str(stored), tmp_path).path)
    trusted = names(resolve(str(stored), tmp_path, trust_remote_code=True).path)
    assert "chat_templates/rag.jinja" in plain
    assert trusted == plain | {"code.py"}
    assert all(not name.startswith(("consolidated", "original", "logs")) for name in plain)
    assert plain & {"notes.pdf", "pytorch_model.bin"} == set()


def test_names_that_lead_out_of_the_folder_are_left_out():
    assert fetched.is_model_file("../x.jinja", ("*/*.jinja",)) is False
    assert fetched.is_model_file("a/x.jinja", ("*/*.jinja",)) is True


def test_a_download_that_is_broken_off_goes_on(stored, tmp_path, monkeypatch):
    real, left = fetched.download, ["tokenizer.json"]
    got = []

    def download(path, to):
        got.append(path.name)
        real(path, to)
        if path.name in left:
            to.write_bytes(to.read_bytes()[:10])
            raise StoreError("it broke off")

    monkeypatch.setattr(fetched, "download", download)
    with pytest.raises(StoreError, match="broke off"):
        resolve(str(stored), tmp_path)
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    left.clear()
    first = len(got)
    assert resolve(str(stored), tmp_path).path.is_dir()
    assert "tokenizer.json" in got[first:]
    assert "model.safetensors" not in got[first:]
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [False]


def test_two_at_once_download_it_once(stored, tmp_path, downloads):
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: resolve(str(stored), tmp_path), range(2))
    assert one == two
    assert len(downloads) == len(set(downloads))


@pytest.mark.long
def test_a_gguf_file_is_downloaded_and_converted(s3, tmp_path):
    from batchrun.models.resolve import embedded_gguf  # noqa: PLC0415

    file = embedded_gguf()
    assert file is not None
    path = s3.put("smol.gguf", file.read_bytes())
    found = resolve(str(path), tmp_path)
    assert (found.path / "model.safetensors").is_file()
    assert found.path.name.startswith("smol-")


def test_what_is_no_model_is_refused(s3, stored, tmp_path, monkeypatch):
    s3.put("pickled/pytorch_model.bin")
    for name, says in (
        ("none", "no model .*/none: there is no such object or folder"),
        ("tiny-1.5/config.json", "is a single file"),
        ("pickled", "safetensors"),
    ):
        with pytest.raises(ModelError, match=says) as refused:
            resolve(f"{s3.bucket}/{name}", tmp_path)
        assert refused.value.hint
    usage = fetched.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetched.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match="GB left"):
        resolve(str(stored), tmp_path)


def test_a_folder_of_the_store_is_not_looked_for_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nothing:/a").mkdir(parents=True)
    with pytest.raises(StoreError, match="there is no store nothing://"):
        resolve(str(ObjectPath("nothing://a")), tmp_path)
