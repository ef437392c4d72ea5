"""Sequences that wait for a slot, and why some would wait forever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice

from batchrun.engine.core import EngineError, Group, Request, Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.prefixes import BLOCK, SharedPrefixes


class WaitingQueue:
    """Sequences without a slot, in order; those with a common prefix are adjacent.

    Args:
        prefixes: What slots hold of their tokens; told which tokens are waited for.
    """

    def __init__(self, prefixes: SharedPrefixes) -> None:
        self._prefixes = prefixes
        self._queue: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that has run goes before new ones and before later arrivals.

        Otherwise beams of a younger row would be computed before those that older rows wait for.
        """
        queue, place = self._queue, 0
        self._prefixes.read(sequence)
        if sequence.high_water:
            while place < len(queue) and _goes_first(queue[place], sequence):
                place += 1
        else:
            place = self._prefixes.place(sequence, queue)
        queue.insert(place, sequence)
        self._prefixes.want(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue."""
        self._queue.remove(sequence)
        self._prefixes.unwant(sequence)

    def first(self, groups: Collection[Group], places: int) -> tuple[Sequence, int, int] | None:
        """The next sequence to admit, the slot with most of its prefix, and its tokens ready there.

        Args:
            groups: Groups that have started and thus have places for all their sequences.
            places: Places for other sequences.
        """
        for sequence in self._queue:
            if sequence.group in groups:
                if sequence.idle:
                    continue
            elif sequence.width > places:
                if not groups:
                    break
                places = 0  # only started groups may overtake it
                continue
            slot, ready, coming = self._prefixes.match(sequence)
            if coming - ready < BLOCK:
                return sequence, slot, ready
            # otherwise a running sequence is computing what it needs: wait to share it
        return None

    def num_tokens(self, count: int, most: int) -> int:
        """Tokens of the first `count` sequences, at most `most`."""
        tokens = 0
        for sequence in islice(self._queue, max(0, count)):
            tokens += sequence.num_tokens
            if tokens >= most:
                return most
        return tokens


def _goes_first(other: Sequence, sequence: Sequence) -> bool:
    """Whether a waiting sequence goes before `sequence`, which has run."""
    return other.high_water > 0 and other.arrived < sequence.arrived


def why_refused(
    prompt_tokens: int,
    beams: int,
    *,
    scored: bool = False,
    max_model_len: int,
    max_num_seqs: int,
    can_fit: Callable[[int], bool],
) -> tuple[str, str] | None:
    """Why a row can never be computed: the kind of failure and the reason. None if it can."""
    if prompt_tokens + 1 > max_model_len:
        answer = (
            f"the prompt has {prompt_tokens} tokens, and the context holds "
            f"{max_model_len}, of which the answer needs at least one"
        )
        text = (
            f"the prompt and the text to score have {prompt_tokens + 1} tokens, and the "
            f"context holds {max_model_len}"
        )
        return "prompt_too_long", text if scored else answer
    if not can_fit(prompt_tokens + 1):
        return (
            "kv_budget",
            f"the prompt has {prompt_tokens} tokens, whose keys and values "
            "exceed the KV budget; raise --kv-budget",
        )
    if beams > max_num_seqs:
        return (
            "bad_parameter",
            f"the row has {beams} beams, but only {max_num_seqs} sequences run "
            "at once; raise --max-num-seqs or lower --num-beams",
        )
    return None


def why_row_refused(
    request: Request, *, max_model_len: int, max_num_seqs: int, can_fit: Callable[[int], bool]
) -> tuple[str, str] | None:
    """As `why_refused`, for all that a request asks for."""
    refuse = partial(
        why_refused, max_model_len=max_model_len, max_num_seqs=max_num_seqs, can_fit=can_fit
    )
    prompt, refused = len(request.prompt_ids), None
    if request.scoring is not None:
        begin, end = request.scoring.span(prompt)
        refused = refuse(end, 1, scored=True) if end > begin else None
    if refused is None and request.params.max_tokens:
        refused = refuse(prompt, request.params.num_beams)
    return refused


def check_machine(space: KVSpace) -> None:
    """Blame the machine, not a row, if its lack of memory is why nothing can be computed.

    Raises:
        EngineError: The machine has no memory.
    """
    if space.refusal:
        raise EngineError(
            f"there is no memory for a single row: {space.refusal}",
            hint="finished rows are kept; then: batchrun resume",
        )
