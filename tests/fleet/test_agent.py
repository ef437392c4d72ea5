"""A node finds the model by its content, or gets it, and checks what arrives."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchrun.errors import MachineError, ModelError
from batchrun.fleet import agent as agents
from batchrun.fleet import cluster
from batchrun.fleet.agent import Agent, Model, Node
from batchrun.models.resolve import ModelRef, embedded_gguf, fingerprint
from tests.s3 import S3
from tests.tiny import write_tiny_model


@dataclass
class _Call:
    """A method of an actor that is here."""

    method: Any

    def remote(self, *arguments: Any) -> Any:
        return self.method(*arguments)


class _Here:
    """Ray, as far as shipping needs it, with everything in this process."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.puts = agent, 0

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self.agent, name))

    def put(self, value: bytes) -> bytes:
        self.puts += 1
        return value

    def get(self, value: Any) -> Any:
        return value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_tiny_model(tmp_path_factory.mktemp("coordinator") / "tiny")
    (folder / "extra").mkdir()
    (folder / "extra" / "empty.txt").touch()
    return Model("no-such/model-anywhere", str(folder), fingerprint(folder), False)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "node"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = Agent()
    yield found
    found.close()


def elsewhere(model: Model) -> Model:
    """The same model, as seen from a node that has nothing at its path."""
    return model._replace(path="/nowhere/tiny")


def test_what_is_at_the_same_path_is_used_if_it_is_the_same(agent: Agent, model: Model) -> None:
    assert agent.look([model]).paths == (model.path,)
    assert agent.look([model._replace(fingerprint="another")]).paths == (None,)
    assert agent.look([elsewhere(model), model]).paths == (None, model.path)


@pytest.mark.skipif(embedded_gguf() is None, reason="the embedded model is not installed")
@pytest.mark.long
def test_a_name_means_the_same_model_on_each_node(agent: Agent, smollm2: ModelRef) -> None:
    wanted = Model(smollm2.name, "/nowhere", smollm2.fingerprint, False)
    [path] = agent.look([wanted]).paths
    assert path is not None
    assert fingerprint(Path(path)) == smollm2.fingerprint


def test_each_node_downloads_a_model_from_its_store(agent: Agent, model: Model, s3: S3) -> None:
    for file in Path(model.path).rglob("*"):
        if file.is_file():
            s3.put(f"model/{file.relative_to(model.path)}", file.read_bytes())
    wanted = Model(f"{s3.bucket}/model", "/nowhere", model.fingerprint, False)
    [path] = agent.look([wanted]).paths
    assert path is not None
    assert fingerprint(Path(path)) == model.fingerprint
    assert agent.look([wanted._replace(fingerprint="another")]).paths == (None,)


@pytest.mark.parametrize("piece", [1 << 10, 1 << 30])
def test_a_model_travels_in_pieces(
    agent: Agent, model: Model, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PIECE", piece)
    ray = _Here(agent)
    parcel = cluster._Parcel(ray)
    path = parcel.ship(ray, model)
    assert fingerprint(Path(path)) == model.fingerprint
    sent = {p.relative_to(model.path): p for p in Path(model.path).rglob("*") if p.is_file()}
    arrived = {p.relative_to(path): p for p in Path(path).rglob("*") if p.is_file()}
    assert sent.keys() == arrived.keys()
    assert all(p.read_bytes() == sent[name].read_bytes() for name, p in arrived.items())
    assert agent.look([elsewhere(model)]).paths == (path,)
    before = ray.puts
    assert parcel.ship(ray, model) == path  # another agent of the same node
    assert ray.puts == before
    assert [p.name for p in Path(path).parent.iterdir()] == [Path(path).name]


def test_what_arrives_damaged_is_refused(agent: Agent, model: Model) -> None:
    ray = _Here(agent)
    receive = agent.receive

    def damaging(model: Model, name: str, offset: int, piece: bytes) -> None:
        receive(model, name, offset, piece[::-1] if name.endswith(".safetensors") else piece)

    agent.receive = damaging  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"arrived at .* with the fingerprint"):
        cluster._Parcel(ray).ship(ray, model)
    assert agent.look([elsewhere(model)]).paths == (None,)
    assert not [*Path(agents.home() / "models").glob(".*")]


def test_a_damaged_copy_is_not_used_again(agent: Agent, model: Model) -> None:
    ray = _Here(agent)
    path = Path(cluster._Parcel(ray).ship(ray, model))
    shutil.copy(path / "config.json", path / "model.safetensors")
    assert agent.look([elsewhere(model)]).paths == (None,)
    assert Path(cluster._Parcel(ray).ship(ray, model)) == path
    assert fingerprint(path) == model.fingerprint


def test_another_version_on_a_node_is_said() -> None:
    with pytest.raises(
        MachineError, match=r"the node a has batchrun-llm 0\.0\.1, and .* 0\.1"
    ) as error:
        cluster._check(Node("a", "0.0.1", ()))
    assert error.value.hint is not None
    assert "pip install batchrun-llm==" in error.value.hint
