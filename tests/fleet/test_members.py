"""What a fleet makes of what workers say: who is given up, who is started again, what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from batchrun.engine.core import EngineError
from batchrun.errors import MachineError, ModelError
from batchrun.fleet import fleet as fleets
from batchrun.fleet.fleet import Fleet
from batchrun.fleet.messages import (
    Closed,
    Failed,
    Finish,
    FromWorker,
    Limits,
    Log,
    Lost,
    Ready,
    Recall,
    Setup,
    Stop,
    ToWorker,
)
from batchrun.fleet.processes import Workers
from batchrun.jobs.metrics import recorded
from batchrun.jobs.options import ModelSpec, PromptSpec, SamplingSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec


class Scripted(Workers):
    """Workers that say what a test has them say."""

    def __init__(self) -> None:
        self.said: list[tuple[int, FromWorker]] = []
        self.started: list[tuple[int, str]] = []
        self.sent: list[tuple[int, ToWorker]] = []
        self.ended: list[tuple[int, bool]] = []

    def start(self, worker: int, setup: Setup) -> None:
        self.started.append((worker, setup.name))

    def send(self, worker: int, message: ToWorker) -> None:
        self.sent.append((worker, message))

    def poll(self, timeout: float) -> Sequence[tuple[int, FromWorker]]:
        said, self.said = self.said, []
        return said

    def end(self, worker: int, *, at_once: bool = False) -> None:
        self.ended.append((worker, at_once))

    def close(self) -> None:
        pass


@pytest.fixture
def workers() -> Scripted:
    return Scripted()


@pytest.fixture
def lines() -> list[str]:
    return []


def ready(context: int = 100, arithmetic: str = "x", **more: Any) -> Ready:
    figures = recorded({"arithmetic": arithmetic, **more})
    return Ready(Limits(context, 4, 64), figures, "host")


@pytest.fixture
def make(workers: Scripted, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a fleet of three, of which these have said something."""
    monkeypatch.setattr(fleets, "read_model", lambda spec: None)
    monkeypatch.setattr(fleets, "model_prompts", lambda *_: None)

    def made(*said: tuple[int, FromWorker], **runtime: Any) -> Fleet:
        spec = JobSpec(
            (), "jsonl", PromptSpec(), ModelSpec(), SamplingSpec(), runtime=RuntimeSpec(**runtime)
        )
        setups = [Setup(spec, "cpu", f"cpu:{i}") for i in range(3)]
        fleet = Fleet(spec, workers, setups, lines.append)
        workers.said = list(said)
        fleet.open()
        return fleet

    return made


def hear(fleet: Fleet, workers: Scripted, *said: tuple[int, FromWorker]) -> list[Any]:
    workers.said = list(said)
    return [*fleet.poll(0)]


def test_those_that_are_ready_are_told_once(make: Any, workers: Scripted) -> None:
    fleet = make((0, Log("hello")), (1, ready()), (0, ready()))
    assert [worker for worker, _ in fleet.poll(0)] == [1, 0]
    assert fleet.poll(0) == []
    assert fleet.ready == [0, 1]
    assert fleet.num_coming == 1
    fleet.recall([(1, 2)], None)
    assert [w for w, m in workers.sent if isinstance(m, Recall)] == [0, 1]
    assert [w for w, _ in hear(fleet, workers, (2, ready()))] == [2]
    assert [w for w, m in workers.sent if isinstance(m, Recall)] == [0, 1, 2]


def test_what_all_say_is_logged_once(make: Any, workers: Scripted, lines: list[str]) -> None:
    make((0, Log("the same")), (1, Log("the same")), (2, Log("another")), (0, ready()))
    assert lines == ["the same", "another"]


def test_one_whose_answers_may_differ_is_given_up(
    make: Any, workers: Scripted, lines: list[str]
) -> None:
    fleet = make((0, ready()), deterministic=True)
    fleet.poll(0)
    assert hear(fleet, workers, (1, ready(context=99)), (2, ready(arithmetic="y"))) == []
    assert workers.ended == [(1, True), (2, True)]
    assert fleet.ready == [0]
    assert "its context has 99 tokens, and that of cpu:0 100" in lines[0]
    assert (
        "cpu:2 is lost: --deterministic can't be guaranteed: workers compute with x and with y"
        in lines[1]
    )
    assert "1 of 3 devices" in lines[1]
    assert fleet.measurements()["varies"] == ""


def test_without_deterministic_it_is_noted(make: Any, workers: Scripted) -> None:
    fleet = make((0, ready()), (1, ready(arithmetic="y")))
    assert fleet.ready == [0, 1]
    assert fleet.measurements()["varies"] == "workers computed with x and with y"


def test_a_silent_one_is_ended_and_started_again(make: Any, workers: Scripted) -> None:
    fleet = make((0, ready()), (1, ready()))
    fleet.poll(0)
    fleet._patience = -1.0
    [(first, lost), (second, _)] = fleet.poll(0)
    assert (first, second) == (0, 1)
    assert isinstance(lost, Lost)
    assert "has not responded" in lost.how
    assert workers.ended == [(0, True), (1, True)]
    assert workers.started[3:] == [(3, "cpu:0"), (4, "cpu:1")]
    assert hear(fleet, workers, (0, ready())) == []  # it is another worker's place now


def test_one_that_is_lost_again_and_again_is_given_up(
    make: Any, workers: Scripted, lines: list[str]
) -> None:
    fleet = make((0, ready()))
    fleet.poll(0)
    worker = 1
    for _ in range(4):
        [_] = hear(fleet, workers, (worker, Lost("was killed by SIGKILL")))
        worker = workers.started[-1][0]
    assert len(workers.started) == 7
    [_] = hear(fleet, workers, (worker, Lost("was killed by SIGKILL")))
    assert len(workers.started) == 7
    assert lines[-1] == (
        "cpu:1 is lost: its worker was killed by SIGKILL, 5 times in a row; "
        "the job continues with 2 of 3 devices"
    )
    assert fleet.measurements()["devices"][1]["lost"] == lines[-1].split(": ")[1].split(";")[0]
    [_] = hear(fleet, workers, (2, Lost("was killed by SIGKILL", for_good=True)))
    with pytest.raises(MachineError, match="the worker on cpu:0 was killed"):
        hear(fleet, workers, (0, Lost("was killed by SIGKILL", for_good=True)))


def test_a_model_that_is_refused_ends_it_before_any_is_ready(make: Any, workers: Scripted) -> None:
    with pytest.raises(ModelError, match="refused"):
        make((1, Failed(ModelError("refused"))))
    workers.__init__()  # type: ignore[misc]
    fleet = make((0, ready()))
    fleet.poll(0)
    hear(fleet, workers, (1, Failed(ModelError("its disk is broken"))))
    assert fleet.ready == [0]
    hear(fleet, workers, (2, Failed(EngineError("no memory"))))
    with pytest.raises(EngineError, match="no memory either"):
        hear(fleet, workers, (0, Failed(EngineError("no memory either"))))


def test_its_end(make: Any, workers: Scripted) -> None:
    fleet = make((0, ready()), (1, ready()))
    fleet.begin_to_end(Stop())
    assert workers.ended == [(2, True)]  # it hears nothing yet
    assert [w for w, m in workers.sent if isinstance(m, Stop)] == [0, 1]
    figures = recorded({"generated_tokens": 7, "running": 3})
    fleet.poll(0)
    assert hear(fleet, workers, (0, Closed(figures)), (1, Lost("was killed by SIGKILL"))) == [
        (1, Lost("was killed by SIGKILL"))
    ]
    assert not fleet.is_open
    assert len(workers.started) == 3
    assert fleet.load() == (0, 0, 7)


def test_those_that_do_not_end_are_ended(make: Any, workers: Scripted) -> None:
    fleet = make((0, ready()), (1, ready()), (2, ready()))
    fleet.begin_to_end(Finish())
    assert fleet.is_open
    fleet.end()
    assert not fleet.is_open
    assert workers.ended == [(0, True), (1, True), (2, True)]


def test_a_fleet_that_never_comes_up_can_be_left(make: Any, workers: Scripted) -> None:
    fleet = make((0, ready()))
    fleet.members[0].is_ready = False
    looks = iter([False, False, True])
    fleet.open(lambda: next(looks))
    assert fleet.ready == []
