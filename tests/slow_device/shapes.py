"""Ways to run a job over the slow device, none of which changes what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import strategies as st

from batchrun.allocator.arena import KVArena
from batchrun.engine.build import Assembly
from batchrun.engine.model.prepare import LoadedModel
from tests.parity.runner import told
from tests.parity.test_generate import bytes_per_token
from tests.slow_device.device import SlowDevice
from tests.slow_device.rig import rig

Answers = dict[tuple[int, ...], list[int]]
PAGE = 4096  # bytes, as of `tests.parity.runner.rig`


@dataclass(frozen=True)
class Shape:
    """One of them.

    Args:
        lag: Steps in flight.
        early: See `SlowDevice`, and `seed`.
        tokens: That memory is for, beside what fills graphs up; None for as many as there are.
        greedy: Whether whatever fits is admitted, to be preempted soon after.
        graphs: Whether decode steps are recorded.
        drafts: Whether there are draft tokens.
    """

    lag: int = 1
    early: float = 0.0
    seed: int = 0
    tokens: int | None = None
    greedy: bool = False
    chunk: int = 40
    sequences: int = 9
    layers_per_slab: int = 3
    staging: int = 1 << 16
    graphs: bool = False
    drafts: bool = False
    share: bool = True

    @contextmanager
    def rig(self, model: LoadedModel, answers: Answers | None = None) -> Iterator[Assembly]:
        """The engine, over a device of its own.

        Args:
            model: The model.
            answers: By prompt, for draft tokens; None for those of a row's own text.
        """
        budget = None if self.tokens is None else self.tokens * bytes_per_token(model)
        if budget is not None and self.graphs:  # a page in each slab of a slot of its own
            budget += PAGE * -(-len(model.layers) // self.layers_per_slab)
        anyone = patch.object(KVArena, "has_room", lambda *_: True)
        with (
            anyone if self.greedy else nullcontext(),
            SlowDevice(self.early, self.seed).installed() as device,
            rig(
                device,
                model,
                lag=self.lag,
                staging=self.staging,
                graphs=(1, 4, 9, 20) if self.graphs else (),
                kv_budget=budget,
                max_num_batched_tokens=self.chunk,
                max_num_seqs=self.sequences,
                layers_per_slab=self.layers_per_slab,
                share_prefixes=self.share,
            ) as made,
        ):
            if self.drafts:
                proposer = told(answers or {}, made._constraints, overlap=self.lag > 0)
                made.scheduler.stays.proposer = proposer
            yield made


def shapes(least_tokens: int, *, least_sequences: int = 1) -> st.SearchStrategy[Shape]:
    """Any of them that has memory for so many tokens."""
    return st.builds(
        Shape,
        lag=st.sampled_from([1, 1, 0]),
        early=st.sampled_from([0.0, 0.1, 0.5]),
        seed=st.integers(0, 99),
        tokens=st.none() | st.integers(least_tokens, 2 * least_tokens),
        greedy=st.booleans(),
        chunk=st.integers(3, 60),
        sequences=st.integers(least_sequences, 9),
        layers_per_slab=st.sampled_from([3, 1]),
        staging=st.sampled_from([1 << 16, 1 << 10, 0]),
        graphs=st.booleans(),
        drafts=st.booleans(),
        share=st.sampled_from([True, True, False]),
    )
