"""An executor without a model whose tokens prove that memory, order and resume are right.

It writes each token id into the slot and computes the next token from what it reads back from the
slot: a page that is shared by mistake, lost, or stale changes the answer.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from batchrun.engine.core import Segment, StepPlan, StepTokens
from batchrun.engine.executor import Ticket

VOCAB = 997


def next_token(ids: Seq[int]) -> int:
    """The token that follows `ids`: each of them and its position matter."""
    total = 17
    for position, token in enumerate(ids, 1):
        total = (total + position * (token + 1)) % 1_000_003
    return total % VOCAB


def expected(prompt: Seq[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class EchoExecutor:
    """Keys `[slots, tokens, 1, dim]` of float64 hold the token ids, in every element."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def launch(self, plan: StepPlan) -> Ticket:
        for s in plan.segments:
            ids = torch.tensor(s.sequence.token_ids(s.start, s.length), dtype=torch.float64)
            self.keys[s.slot, s.start : s.start + s.length] = ids[:, None, None]
            self.values[s.slot, s.start : s.start + s.length] = -ids[:, None, None]
        tokens = [next_token(self._read(s)) for s in plan.segments if s.sampled]
        return Ticket(plan.step, torch.tensor(tokens, dtype=torch.int64))

    def collect(self, ticket: Ticket) -> StepTokens:
        return StepTokens(ticket.step, tuple(ticket.tokens.tolist()))

    def _read(self, segment: Segment) -> list[int]:
        end = segment.start + segment.length
        keys, values = self.keys[segment.slot, :end], self.values[segment.slot, :end]
        assert torch.equal(keys, -values), "keys and values of a token disagree"
        assert torch.equal(keys, keys[:, :, :1].expand_as(keys)), "a token's elements disagree"
        return keys[:, 0, 0].long().tolist()
