"""What goes between deciding and doing is values: they can be sent to another process."""

from __future__ import annotations

import math
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch

from batchrun.engine.core import Completion, Request, SamplingParams
from batchrun.engine.executor import Executor, Ticket
from batchrun.engine.plan import Masks, StepOutput, StepPlan
from tests.parity.runner import rig, run
from tests.parity.test_generate import loaded, prompts

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.9, "scored": True},
    {"presence_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 5},
    {"num_beams": 3, "repetition_penalty": 1.3},
    {"ignore_eos": True, "frequency_penalty": 0.3, "temperature": 0.5},
]


class Elsewhere:
    """An executor that sees nothing but what comes through a pickle."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._tickets: dict[int, Ticket] = {}
        self.lag = executor.lag
        self.on_host = False

    def seconds(self) -> tuple[float, float]:
        return 0.0, 0.0

    def launch(self, plan: StepPlan) -> Ticket:
        sent = sent_anew(plan)
        self._tickets[plan.step] = self._executor.launch(sent)
        return Ticket(plan.step)

    def sample(self, ticket: Ticket, masks: Masks | None = None) -> None:
        self._executor.sample(self._tickets[ticket.step], pickle.loads(pickle.dumps(masks)))

    def collect(self, ticket: Ticket) -> StepOutput:
        return sent_anew(self._executor.collect(self._tickets.pop(ticket.step)))

    def busy(self) -> bool:
        return self._executor.busy()


def sent_anew(value: Any) -> Any:
    """The same value, as another process gets it."""
    sent = pickle.loads(pickle.dumps(value))
    assert type(sent) is type(value)
    if isinstance(value, StepPlan):
        assert [asdict(s) for s in sent.segments] == [asdict(s) for s in value.segments]
        assert (sent.new, sent.copies) == (value.new, value.copies)
    else:
        assert sent == value
    return sent


@pytest.mark.parametrize("lag", [0, 1])
def test_an_executor_needs_nothing_but_plans(lag: int) -> None:
    each = [SamplingParams(**{"max_tokens": 12, **KINDS[i % 5]}) for i in range(len(prompts()))]

    def completions(*, elsewhere: bool) -> list[tuple[Any, ...]]:
        with rig(loaded("llama"), lag=lag, kv_budget=30 * 4096, max_num_batched_tokens=50) as r:
            if elsewhere:
                r.engine.executor = Elsewhere(r.executor)
            done = [sent_anew(completion) for completion in run(r, prompts(), each, seed=3)]
            assert r.scheduler.num_preemptions or r.scheduler.stays.num_recomputed_tokens
            return [(c.request, c.token_ids, c.finish_reason, c.logprob) for c in done]

    assert completions(elsewhere=True) == completions(elsewhere=False)


@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_decided_between_forward_and_sampling_counts(lag: int) -> None:
    with rig(loaded("llama"), lag=lag) as r:
        sample = r.executor.sample

        def odd(ticket: Ticket, masks: Masks | None) -> None:
            assert ticket.tokens is None, "tokens were chosen by the forward"
            if ticket.logits is not None:
                even = torch.arange(ticket.logits.shape[1]) % 2 == 0
                ticket.logits = ticket.logits.masked_fill(even, -math.inf)
            sample(ticket, masks)

        r.executor.sample = odd  # type: ignore[method-assign]
        done = run(r, prompts(), SamplingParams(max_tokens=9, ignore_eos=True))
        assert all(token % 2 for completion in done for token in completion.token_ids)


def test_a_completion_is_a_value() -> None:
    request = Request(3, 1, (5, 6), SamplingParams(stop=("x",)), 7)
    one = Completion(request, (9,), "text", logprob=-0.5, arrived=1.0, finished=2.0)
    assert sent_anew(one) == one
    assert hash(one) == hash(sent_anew(one))
