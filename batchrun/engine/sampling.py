"""Logits to tokens, reproducible for each row whatever else is in the batch."""

from __future__ import annotations

import struct
from collections.abc import Collection
from collections.abc import Sequence as Seq
from hashlib import blake2b

import torch

from batchrun.engine.core import Sequence

_HEAD = 1024  # most likely tokens looked at before a whole vocabulary is sorted


def uniform(seed: int, row: int, sample: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone.

    A counter-based stream (Salmon et al., SC 2011, with BLAKE2 in the place of Philox): batching,
    order, preemption and a crash can't shift it.
    """
    key = struct.pack("<qqqq", seed, row, sample, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) / 2**53


def sample(
    logits: torch.Tensor, sequences: Seq[Sequence], stop_ids: Seq[Collection[int]]
) -> torch.Tensor:
    """Choose the next token of each sequence.

    Each row is treated by its own parameters, in transformers' order: penalties, minimum length,
    temperature, top-k, top-p, min-p.

    Args:
        logits: `[N, V]`, float32; changed in place.
        sequences: The N sequences; a draw belongs to the position that it fills.
        stop_ids: The tokens that would end each of them.

    Returns:
        `[N]` int64 token ids on the device of `logits`.
    """
    for i, sequence in enumerate(sequences):
        params = sequence.request.params
        if params.penalised:
            _penalise(logits[i], sequence)
        if len(sequence.output_ids) < params.min_tokens and stop_ids[i]:
            logits[i, list(stop_ids[i])] = -torch.inf
    drawn = [i for i, s in enumerate(sequences) if not s.request.params.greedy]
    tokens = logits.argmax(dim=-1)
    if drawn:
        rows = logits if len(drawn) == len(sequences) else logits[drawn]
        tokens[drawn] = _draw(rows, [sequences[i] for i in drawn])
    return tokens


def _penalise(logits: torch.Tensor, sequence: Sequence) -> None:
    """Apply repetition, presence and frequency penalties to one row `[V]`, in place."""
    params = sequence.request.params
    output = torch.tensor(sequence.output_ids, dtype=torch.int64, device=logits.device)
    if params.repetition_penalty != 1:
        prompt = torch.tensor(sequence.request.prompt_ids, device=logits.device)
        seen = torch.cat([prompt, output]).unique()
        value = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(value < 0, value * penalty, value / penalty)
    if len(output):
        ids, counts = output.unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Draw from `[N, V]` by inverting each row's distribution at its own uniform number."""
    params = [s.request.params for s in sequences]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    logits = logits / column([p.temperature for p in params]).float()
    if any(p.top_k or p.top_p < 1 or p.min_p > 0 for p in params):
        for i, p in enumerate(params):
            if p.top_k or p.top_p < 1 or p.min_p > 0:
                _filter(logits[i], p.top_k, p.top_p, p.min_p)
    cdf = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    numbers = column(
        [uniform(s.request.seed, s.request.row, s.request.sample, s.num_tokens) for s in sequences]
    )
    # Strictly below the end, so that rounding can never choose a token of probability zero.
    target = torch.minimum(numbers * cdf[:, -1:], torch.nextafter(cdf[:, -1:], cdf[:, :1] * 0))
    return torch.searchsorted(cdf, target, right=True)[:, 0]


def _filter(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """Set the logits that top-k, top-p and min-p rule out to minus infinity, on one row `[V]`."""
    vocab = logits.shape[0]
    if top_k and top_k < vocab:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    if top_p < 1:
        total = logits.double().logsumexp(0)
        for size in (min(_HEAD, vocab), vocab):
            head = logits.topk(size).values
            mass = (head.double() - total).exp().cumsum(0)
            if mass[-1] >= top_p or size == vocab:
                break
        # The token that reaches top_p is the last one kept.
        last = min(int(torch.searchsorted(mass, top_p)), size - 1)
        logits[logits < head[last]] = -torch.inf
    if min_p > 0:
        threshold = logits.max() + torch.log(torch.tensor(min_p, device=logits.device))
        logits[logits < threshold] = -torch.inf
