"""Processors that change logits before a token is chosen, one class each."""

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
    """A row of logits, used to choose the token after the first `end` tokens of a sequence.

    `output_ids` is the sequence's output as the host knows it, with draft tokens: complete if no
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
        """Maximum length of prompt and output together, by the parameters."""
        return self.num_prompt_tokens + self.params.max_tokens

    def ids_so_far(self, last: int | None = None) -> list[int]:
        """The sequence's tokens up to `end`.

        Args:
            last: Only the last that many, at most `end`; None for all.
        """
        begin = (0 if last is None else self.end - last) - self.num_prompt_tokens
        output = self.output_ids[max(begin, 0) : self.num_generated]
        return output if begin >= 0 else [*self.request.prompt_ids[begin:], *output]


Places = tuple[torch.Tensor, torch.Tensor]
"""Row and token indices into `[N, V]`."""


class LogitsProcessor:
    """Changes the logits of rows; one instance serves all rows of a job.

    In each step `prepare` is called while the device computes the logits, then `apply`, then
    `accept` when the tokens are chosen. The rows of a sequence with draft tokens are consecutive. A
    processor without state across steps needs only the first two.
    """

    def prepare(self, rows: Seq[LogitsRow]) -> bool:
        """Do the host's part; returns whether `apply` would change anything."""
        return True

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """Change `[N, V]`, possibly in place; returns it, in float32 or its own dtype.

        For beams these are log-probabilities. May be called again with the original logits.
        """
        raise NotImplementedError

    def accept(self, tokens: torch.Tensor, rows: Seq[LogitsRow]) -> None:
        """Take note of the chosen tokens `[N]`, on the device of the logits; -1 means none."""

    def rollback(self, row: LogitsRow, count: int) -> None:
        """Forget the last `count` tokens chosen for a sequence: they followed rejected drafts."""


class Edits(LogitsProcessor):
    """Changes some logits of each row, based on what is known about the row.

    Args:
        upload: Copies an array to the device without waiting.
    """

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self._edits: list[tuple[int, int, float]] = []  # rows, tokens, numbers

    @abstractmethod
    def edits(self, row: LogitsRow) -> Iterable[tuple[int, float]]:
        """Tokens of a row, each with a number from which `write` makes its logit."""

    def prepare(self, rows: Seq[LogitsRow]) -> bool:
        """See `LogitsProcessor.prepare`."""
        self._edits = [(i, *edit) for i, row in enumerate(rows) for edit in self.edits(row)]
        return bool(self._edits)

    def apply(self, logits: torch.Tensor, rows: Seq[LogitsRow]) -> torch.Tensor:
        """See `LogitsProcessor.apply`."""
        # Rows may name any tokens; those beyond the vocabulary are never drawn.
        found = [edit for edit in self._edits if edit[1] < logits.shape[1]]
        if not found:
            return logits
        row, token, number = self._upload(np.array(found, np.float64).T)
        return self.write(logits, (row.long(), token.long()), number)

    def write(self, logits: torch.Tensor, at: Places, numbers: torch.Tensor) -> torch.Tensor:
        """Write float64 numbers into `[N, V]`; returns it as `apply` does."""
        logits[at] = numbers.to(logits.dtype)
        return logits


def bans(tokens: Iterable[int]) -> list[tuple[int, float]]:
    """Edits that ban these tokens."""
    return [(token, -math.inf) for token in tokens]


class EndTokens(Edits):
    """Bans the model's end tokens in rows that ignore them, and stop tokens before `min_tokens`.

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
        """See `Edits.edits`; a row's own stop tokens are banned only before `min_tokens`."""
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

    The tokens of each slot's sequence are tracked on the device, which is the first to know the
    last one: how often each is in the output, `[num_slots, V]`, and whether it is in the prompt.

    Args:
        upload: See `Edits`.
        num_slots: Slots that sequences can be in.
    """

    def __init__(self, upload: Upload, num_slots: int) -> None:
        self._upload = upload
        self._num_slots = num_slots
        self._at: list[int] = []  # rows
        self._holds: dict[int, tuple[LogitsRow, int]] = {}  # slot -> its row, output tokens counted
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
        """See `LogitsProcessor.accept`; skips beams, whose tokens are chosen elsewhere."""
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
        """Start over with a sequence that entered the slot, and whose tokens are all known."""
        counts[:], prompt[:] = 0, False
        prompt[self._upload(np.array(row.request.prompt_ids))] = True
        output = row.output_ids[: row.num_generated]
        if output:
            counts.index_add_(0, self._upload(np.array(output)), self._one.expand(len(output)))
