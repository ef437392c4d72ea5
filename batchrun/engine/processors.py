"""What changes logits before a token is chosen by them: one class each, in a list of each job."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from batchrun.engine.attention import Upload
from batchrun.engine.core import Request, SamplingParams
from batchrun.engine.cpu import sampling as cpu_sampling


@dataclass(slots=True, eq=False)
class LogitsRow:
    """A row of logits, by which the token behind the first `end` ones of a sequence is chosen.

    `output_ids` are the sequence's, as the host knows them, with draft tokens: complete where no
    step is in flight. The last `num_drafts` tokens before `end` are draft tokens.
    """

    slot: int
    request: Request
    output_ids: list[int]
    params: SamplingParams
    num_prompt_tokens: int
    end: int = 0
    num_drafts: int = 0

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return self.end - self.num_prompt_tokens

    @property
    def most_tokens(self) -> int:
        """Prompt and output together, as the parameters allow."""
        return self.num_prompt_tokens + self.params.max_tokens

    def ids_so_far(self, last: int | None = None) -> list[int]:
        """The sequence's tokens up to `end`.

        Args:
            last: Only so many, `end` at most; None for all.
        """
        begin = (0 if last is None else self.end - last) - self.num_prompt_tokens
        output = self.output_ids[max(begin, 0) : self.num_generated]
        return output if begin >= 0 else [*self.request.prompt_ids[begin:], *output]


Places = tuple[torch.Tensor, torch.Tensor]
"""Rows and tokens of `[N, V]`."""


class LogitsProcessor:
    """Changes the logits of rows; one for all rows of a job.

    In each step `prepare` comes first, while the device computes the logits, then `apply`, and
    `accept` when the tokens are chosen. The rows of a sequence with draft tokens follow each other.
    One that remembers nothing from step to step has only the first two.
    """

    def prepare(self, rows: Seq[LogitsRow]) -> bool:
        """Do what the host has to; returns whether `apply` would change anything."""
        return True

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """Change `[N, V]`, maybe in place; returns it, in float32 or as it came.

        Of beams they are log-probabilities. May be called again, with logits as they came.
        """
        raise NotImplementedError

    def accept(self, tokens: torch.Tensor, rows: Seq[LogitsRow]) -> None:
        """The tokens `[N]` were chosen, on the device of the logits; -1 where there is none."""

    def rollback(self, row: LogitsRow, count: int) -> None:
        """The last `count` tokens chosen for a sequence are void: they followed wrong drafts."""


class Edits(LogitsProcessor):
    """Changes some logits of each row, by what is known of the row.

    Args:
        upload: Copies an array to the device without waiting.
    """

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._edits: list[tuple[int, int, float]] = []  # rows, tokens, numbers

    @abstractmethod
    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """Tokens of a row, and a number for each, of which `write` makes its logit."""

    def prepare(self, rows: Seq[LogitsRow]) -> bool:
        """See `LogitsProcessor.prepare`."""
        self._edits = [(i, *edit) for i, row in enumerate(rows) for edit in self.edits(row)]
        return bool(self._edits)

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        # A row may name any tokens: none beyond the vocabulary is ever drawn.
        found = [edit for edit in self._edits if edit[1] < logits.shape[1]]
        if not found:
            return logits
        row, token, number = self._upload(np.array(found, np.float64).T)
        return self.write(logits, (row.long(), token.long()), number)

    def write(self, logits: torch.Tensor, at: Places, numbers: torch.Tensor) -> torch.Tensor:
        """Put float64 numbers into `[N, V]`; returns it as `apply` does."""
        logits[at] = numbers.to(logits.dtype)
        return logits


def bans(tokens: Iterable[int]) -> list[tuple[int, float]]:
    """Edits after which these tokens are never chosen."""
    return [(token, -math.inf) for token in tokens]


class EndTokens(Edits):
    """No end token of the model where a row ignores them, nor one that ends it too early.

    Args:
        upload: See `Edits`.
        eos_ids: The model's end tokens.
    """

    def __init__(self, upload: Upload, eos_ids: Collection[int]) -> None:
        super().__init__(upload)
        self._eos_ids = frozenset(eos_ids)
        self._everywhere: torch.Tensor | None = None  # the same on the device
        self._all = False

    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """See `Edits.edits`; not a token that a row stops at itself, but for a row too short."""
        params = row.params
        banned: frozenset[int] = frozenset()
        if params.ignore_eos:
            banned = self._eos_ids.difference(params.stop_token_ids)
        if params.min_tokens > row.num_generated:
            banned |= params.stop_ids(self._eos_ids)
        return bans(banned)

    def prepare(self, rows: Seq[LogitsRow]) -> bool:
        """See `LogitsProcessor.prepare`."""
        each = [row.params for row in rows]
        if not any(p.ignore_eos or p.min_tokens for p in each):
            return False
        self._all = all(p.ignore_eos and not p.stop_token_ids for p in each)
        return bool(self._eos_ids) if self._all else super().prepare(rows)

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        if not self._all:
            return super().apply(logits, rows)
        if self._everywhere is None:
            self._everywhere = torch.tensor(sorted(self._eos_ids), device=logits.device)
        return logits.index_fill_(1, self._everywhere, -torch.inf)


class Penalties(LogitsProcessor):
    """Repetition, presence and frequency penalties.

    They know the tokens of each slot's sequence on the device, because the last one is known there
    first: how often each is in the output, `[num_slots, V]`, and whether it is in the prompt.

    Args:
        upload: See `Edits`.
        num_slots: Slots that sequences can be in.
    """

    def __init__(self, upload: Upload, num_slots: int) -> None:
        self._upload = upload
        self._num_slots = num_slots
        self._at: list[int] = []  # rows
        self._holds: dict[int, tuple[LogitsRow, int]] = {}  # slot -> whose, how many output tokens
        self._counts: torch.Tensor | None = None

    def prepare(self, rows: Seq[LogitsRow]) -> bool:
        """See `LogitsProcessor.prepare`."""
        self._at = [i for i, row in enumerate(rows) if row.params.penalised]
        return bool(self._at)

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        logits = logits.float()
        counts, prompt = self._seen(logits)
        penalised = [rows[i] for i in self._at]
        for row in penalised:
            if self._holds.get(row.slot) != (row, row.num_generated):
                self._rebuild(row, counts[row.slot], prompt[row.slot])
        at, slots = self._upload(np.array(self._at)), self._slots(penalised)
        params = [row.params for row in penalised]
        each = [[p.repetition_penalty for p in params], [p.presence_penalty for p in params]]
        each.append([p.frequency_penalty for p in params])
        penalties = self._upload(np.array(each, dtype=np.float32))
        if logits.device.type == "cpu" and cpu_sampling.penalise(
            logits, at, slots, penalties, counts=counts, prompt=prompt
        ):
            return logits
        repetition, presence, frequency = penalties[:, :, None]
        values, seen = logits[at], counts[slots]
        repeated = torch.where(values < 0, values * repetition, values / repetition)
        values = torch.where(prompt[slots] | (seen > 0), repeated, values)
        logits[at] = values - (presence * (seen > 0) + frequency * seen)
        return logits

    def accept(self, tokens: torch.Tensor, rows: Seq[LogitsRow]) -> None:
        """See `LogitsProcessor.accept`; beams' tokens are chosen elsewhere."""
        at = [i for i in self._at if not rows[i].params.beams]
        if not at:
            return
        counted = [rows[i] for i in at]
        assert self._counts is not None
        taken = tokens[self._upload(np.array(at))].clamp_min(0)
        self._counts.index_put_((self._slots(counted), taken), self._one, accumulate=True)
        for row in counted:
            self._holds[row.slot] = (row, row.num_generated + 1)

    def _seen(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._counts is None:
            shape, device = (self._num_slots, logits.shape[1]), logits.device
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
            self._prompt = torch.zeros(shape, dtype=torch.bool, device=device)
            self._one = torch.ones((), dtype=torch.int32, device=device)
        return self._counts, self._prompt

    def _slots(self, rows: Seq[LogitsRow]) -> torch.Tensor:
        return self._upload(np.array([row.slot for row in rows]))

    def _rebuild(self, row: LogitsRow, counts: torch.Tensor, prompt: torch.Tensor) -> None:
        """Begin anew with a sequence that has come to the slot, all of whose tokens are known."""
        counts[:], prompt[:] = 0, False
        prompt[self._upload(np.array(row.request.prompt_ids))] = True
        output = row.output_ids[: row.num_generated]
        if output:
            counts.index_add_(0, self._upload(np.array(output)), self._one.expand(len(output)))
