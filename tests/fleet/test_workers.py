"""What every kind of workers does: real processes here, and Ray's actors in a real cluster."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from batchrun.engine.core import Request, SamplingParams
from batchrun.fleet.messages import (
    Begun,
    Closed,
    Ended,
    Finish,
    FromWorker,
    Lost,
    Ready,
    Release,
    Returned,
    Setup,
    Stop,
    Work,
)
from batchrun.fleet.processes import Processes, Workers
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec
from batchrun.models.resolve import fingerprint
from batchrun.runner.planner import Waiting
from tests.fleet.nulls import CONTEXT, answer, environment
from tests.tiny import write_tiny_model

PATIENCE_S = 120.0
Open = Callable[[float], tuple[Workers, list[Setup]]]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    model = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return JobSpec(
        inputs=(),
        input_format="parquet",
        prompt=PromptSpec(column="prompt"),
        model=ModelSpec(str(model), str(model), fingerprint(model), "float32"),
        sampling=SamplingSpec(max_tokens=40),
        output=OutputSpec("out.parquet", "parquet"),
        runtime=RuntimeSpec(devices="cpu:2"),
    )


@pytest.fixture(params=["processes", pytest.param("ray", marks=pytest.mark.long)])
def opened(
    request: pytest.FixtureRequest, spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Open]:
    """Opens two workers' places; a step takes so long."""
    found: list[Workers] = []

    def make(pace: float) -> tuple[Workers, list[Setup]]:
        for name, value in environment(tmp_path / "site", pace).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("BATCHRUN_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a process decides it once
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        setups = []
        for i in range(2):
            (tmp_path / str(i)).mkdir()
            setups.append(Setup(spec, "cpu", f"cpu:{i}", notes=str(tmp_path / str(i))))
        if request.param == "processes":
            found.append(Processes(tmp_path))
        else:
            ray = pytest.importorskip("ray")
            from batchrun.fleet.cluster import RayWorkers  # noqa: PLC0415

            ray.init(
                address="local", num_cpus=2, include_dashboard=False, logging_level="error",
                log_to_driver=False,
            )  # fmt: skip
            slots = {setup.name: i for i, setup in enumerate(setups)}
            options = {"num_cpus": 1, "num_gpus": 0}
            found.append(RayWorkers(ray, spec, options, slots, lambda _: None))
        return found[-1], setups

    yield make
    for workers in found:
        workers.close()


def hear(workers: Workers, kind: type, *, of: int = 1, worker: int | None = None) -> list[Any]:
    """Messages of a kind, as many as wanted; others are dropped."""
    found: list[FromWorker] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < of:
        assert time.monotonic() < deadline, f"no {kind.__name__} came"
        for number, message in workers.poll(0.1):
            if isinstance(message, kind) and worker in (None, number):
                found.append(message)
    return found


def rows(count: int, first: int = 0) -> tuple[Waiting, ...]:
    params = SamplingParams(max_tokens=40)
    return tuple(Waiting.of(Request(first + i, 0, (1, 2), params, 0)) for i in range(count))


def results(workers: Workers, count: int) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    while len(found) < count:
        for message in hear(workers, Ended):
            for result in message.results:
                assert result.row not in found
                found[result.row] = result.token_ids
    return found


def test_workers_without_room_are_counted(
    opened: Open, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "ray" not in request.node.callspec.id:
        pytest.skip("a machine's processes need no room")
    from ray.util import placement_group  # noqa: PLC0415

    from batchrun.fleet import cluster  # noqa: PLC0415

    said: list[str] = []
    workers, setups = opened(0.0)
    monkeypatch.setattr(workers, "_log", said.append)
    assert placement_group([{"CPU": 1}]).wait(PATIENCE_S)  # one of two
    for i, setup in enumerate(setups):
        workers.start(i, setup)
    hear(workers, Ready)
    assert said == []
    monkeypatch.setattr(cluster, "_NO_ROOM_S", 0.0)
    for _ in range(3):
        workers.poll(0)
    assert [line.partition(":")[0] for line in said] == [
        "1 of 2 workers wait for room in the Ray cluster"
    ]


@pytest.mark.parametrize("opened", ["processes", "ray"], indirect=True)
def test_they_compute_what_they_are_sent(opened: Open) -> None:
    workers, setups = opened(0.0)
    for i, setup in enumerate(setups):
        workers.start(i, setup)
    ready = hear(workers, Ready, of=2)
    assert [message.limits.max_model_len for message in ready] == [CONTEXT] * 2
    workers.send(0, Work(rows(10)))
    workers.send(1, Work(rows(10, first=10)))
    assert results(workers, 20) == {row: tuple(answer(row, 0, 40)) for row in range(20)}
    for i in range(2):
        workers.send(i, Finish())
    tokens = [message.figures["generated_tokens"] for message in hear(workers, Closed, of=2)]
    assert sum(tokens) == sum(len(answer(row, 0, 40)) for row in range(20))
    for i in range(2):
        workers.end(i)
    workers.send(0, Work(rows(1)))  # dropped
    assert not workers.poll(0.3)


def test_they_give_rows_back_and_say_where_they_are(opened: Open) -> None:
    workers, setups = opened(0.02)
    workers.start(7, setups[0])
    hear(workers, Ready)
    workers.send(7, Work(rows(8, first=1)))
    workers.send(7, Release(3))
    [back] = hear(workers, Returned)
    released = {row.rest.row for row in back.rows}
    assert len(released) == 3
    workers.send(7, Stop())
    begun: list[Begun] = []
    ended: set[int] = set()
    closed = False
    while not closed:
        for _, message in workers.poll(0.1):
            closed = closed or isinstance(message, Closed)
            begun += [message] if isinstance(message, Begun) else []
            ended |= {r.row for r in message.results} if isinstance(message, Ended) else set()
    for partial in begun[-1].partials:
        assert list(partial.token_ids) == answer(partial.row, 0, 40)[: len(partial.token_ids)]
        assert partial.row not in released | ended


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_one_that_is_killed_is_lost_with_its_rows(opened: Open, number: signal.Signals) -> None:
    workers, setups = opened(0.05)
    for i, setup in enumerate(setups):
        workers.start(i, setup)
    hear(workers, Ready, of=2)
    workers.send(1, Work(rows(9)))
    while not any(
        message.figures and message.figures["running"] for message in hear(workers, Ended, worker=1)
    ):
        pass
    victims = [p for p in everybody() if "run-worker" in p.cmdline()]
    assert len(victims) == 2
    for victim in victims:
        victim.send_signal(number)
    lost = {}
    while len(lost) < 2:
        lost |= {w: m for w, m in workers.poll(0.1) if isinstance(m, Lost)}
    crashed = number == signal.SIGSEGV
    assert all(message.crashed == crashed for message in lost.values())
    assert all(number.name in message.how for message in lost.values())
    assert lost[0].suspects == ()
    assert crashed == (0 < len(lost[1].suspects) <= 4)
    assert set(lost[1].suspects) <= set(range(9))
    workers.start(2, setups[0])  # its place is free
    hear(workers, Ready, worker=2)
    workers.send(2, Work(rows(2)))
    assert len(results(workers, 2)) == 2


def everybody() -> list[psutil.Process]:
    """This process's children, and theirs: a cluster's too."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
