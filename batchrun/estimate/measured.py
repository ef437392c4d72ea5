"""How long steps took on this machine, remembered from run to run for `batchrun plan`.

A step's time is modelled as linear in four amounts: the step itself (weights are read, kernels
launched), the tokens of prompts and of answers that it computes, and the bytes of KV cache that its
sequences hold. Of a run's intervals, only the sums that least squares needs are kept: its normal
equations.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from batchrun.jobs.files import make_folders, read_json, write_json
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec

Amounts = tuple[float, float, float, float]  # steps, prompt tokens, tokens of answers, bytes held
_AMOUNTS = 4
_KEPT = 0.5  # weight of earlier runs whenever there is a new one: machines and code change
# Settings that change the number of steps, not the time of one.
_NOT_SPEED = {
    *("max_num_seqs", "max_num_batched_tokens", "kv_budget", "reorder", "share_prefixes"),
    *("devices", "ray", "workers", "gpus_per_worker", "cpus_per_worker"),
    *("name", "path", "draft_model", "draft_path", "max_model_len", "param_columns"),
    *("keep_going", "on_done"),
}
_RIDGE = 1e-9  # of the diagonal: if all steps of a run are alike, amounts can't be told apart
_LEAST = 1e-12  # of an amount's sum of squares: amounts are counts, so less than this is none


@dataclass
class Measured:
    """What runs have taught about one model on one machine.

    Attributes:
        moments: Sums of products of amounts, row by row.
        products: Sums of each amount times seconds.
        seconds: The measured intervals of all runs, in total.
        load_s: Seconds until the last run's model was loaded.
        share: The share of `max_tokens` that rows generated if they could stop early.
        accepted: Accepted draft tokens per generated token.
        rejected: Rejected draft tokens per generated token.
        runs: The number of runs.
    """

    moments: list[float] = field(default_factory=lambda: [0.0] * _AMOUNTS**2)
    products: list[float] = field(default_factory=lambda: [0.0] * _AMOUNTS)
    seconds: float = 0.0
    load_s: float = 0.0
    share: float = 1.0
    accepted: float = 0.0
    rejected: float = 0.0
    runs: int = 0

    @classmethod
    def load(cls, home: Path, spec: JobSpec) -> Measured | None:
        """The figures remembered for jobs like this one; None if there are none, or damaged ones.

        They are only a hint, so losing them is not an error.
        """
        try:
            return cls(**read_json(_path(home, spec)))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, home: Path, spec: JobSpec) -> None:
        """Remember these figures in place of earlier ones.

        Raises:
            JobError: It can't be written.
        """
        path = _path(home, spec)
        make_folders(path.parent)
        write_json(path, asdict(self))

    def add(self, amounts: Amounts, seconds: float) -> None:
        """Add an interval: its steps, its tokens, and its steps times the bytes held."""
        self.moments = (np.outer(amounts, amounts).ravel() + self.moments).tolist()
        self.products = (np.multiply(amounts, seconds) + self.products).tolist()
        self.seconds += seconds

    def after(self, earlier: Measured | None) -> Measured:
        """This run's figures combined with those of earlier runs."""
        if earlier is None:
            return self
        return replace(
            self,
            moments=(np.multiply(_KEPT, earlier.moments) + self.moments).tolist(),
            products=(np.multiply(_KEPT, earlier.products) + self.products).tolist(),
            seconds=earlier.seconds + self.seconds,
            runs=earlier.runs + self.runs,
        )

    def predict(self, amounts: Amounts) -> float:
        """The seconds that these amounts should take."""
        return float(np.dot(self.costs(), amounts))

    @property
    def step_cost(self) -> float | None:
        """A step's fixed cost, in units of one prompt token's time; None if unknown."""
        step, token, other, _ = self.costs()
        token = token or other
        return step / token if step and token else None

    def costs(self) -> list[float]:
        """Seconds per unit of each amount: the best fit in which none is negative.

        With four amounts, every choice of those that are not 0 can be tried (problem NNLS of
        Lawson and Hanson, 1974).
        """
        moments = np.array(self.moments).reshape(_AMOUNTS, _AMOUNTS)
        products = np.array(self.products)
        best, found = 0.0, np.zeros(_AMOUNTS)
        for count in range(1, _AMOUNTS + 1):
            for chosen in combinations(range(_AMOUNTS), count):
                part = moments[np.ix_(chosen, chosen)]
                if (np.diag(part) < _LEAST).any():
                    continue
                ridged = part + _RIDGE * np.diag(np.diag(part))
                costs = np.linalg.solve(ridged, products[list(chosen)])
                error = costs @ part @ costs - 2 * costs @ products[list(chosen)]
                if (costs >= 0).all() and error < best:
                    best, found = error, np.zeros(_AMOUNTS)
                    found[list(chosen)] = costs
        return [float(cost) for cost in found]


_FIGURES = (
    *("engine_s", "steps", "prefill_tokens", "decode_tokens", "drafted_tokens"),
    *("accepted_tokens", "kv_s", "kv_live_s"),
)


class StepSampler:
    """Turns a run's growing figures into intervals.

    Attributes:
        measured: The sums over the intervals so far.
    """

    def __init__(self) -> None:
        self.measured = Measured(runs=1)
        self._before = dict.fromkeys(_FIGURES, 0.0)

    def observe(self, figures: Mapping[str, Any], engines: int = 1) -> None:
        """Add the interval that ends with a run's current figures, those of so many engines.

        What is learned is how long the average engine takes.
        """
        decoded, accepted = figures["decode_tokens"], figures["accepted_tokens"]
        rejected = figures["drafted_tokens"] - accepted
        accepted += figures["forced_tokens"]  # none took a step of its own either
        now = {name: figures[name] for name in _FIGURES}
        passed = {name: now[name] - before for name, before in self._before.items()}
        if passed["steps"] > 0 and passed["kv_s"] > 0:
            self.measured.add(amounts_of(passed, engines), passed["engine_s"])
            self._before = now
            if decoded:
                self.measured.accepted = accepted / decoded
                self.measured.rejected = rejected / decoded


def amounts_of(passed: Mapping[str, float], engines: int) -> Amounts:
    """What the average engine did, from what a run's figures have grown by."""
    rejected = passed["drafted_tokens"] - passed["accepted_tokens"]
    steps, live = passed["steps"] / engines, passed["kv_live_s"] / engines
    answered = (passed["decode_tokens"] + rejected) / engines
    held = steps * live / passed["kv_s"] if passed["kv_s"] else 0.0
    return steps, passed["prefill_tokens"] / engines, answered, held


def _place(runtime: RuntimeSpec) -> str:
    """Where each of a job's engines computes, as far as it says how fast."""
    if runtime.ray is not None:
        return f"ray, {runtime.gpus_per_worker} GPUs, {runtime.cpus_per_worker} CPUs"
    if runtime.devices is None:
        return runtime.device
    return runtime.devices if runtime.devices.startswith("cpu:") else "auto"


def _path(home: Path, spec: JobSpec) -> Path:
    """The file of figures for jobs with the same model, settings and machine."""
    said = {**vars(spec.model), **vars(spec.runtime), "device": _place(spec.runtime)}
    settings = {name: value for name, value in said.items() if name not in _NOT_SPEED}
    settings["amounts"] = _AMOUNTS
    machine = [platform.node(), platform.machine(), os.cpu_count()]
    text = json.dumps([settings, machine], sort_keys=True)
    return home / "measured" / f"{blake2b(text.encode(), digest_size=8).hexdigest()}.json"
