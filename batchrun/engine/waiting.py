"""Sequences that wait for a slot, and why some would wait for ever."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator

from batchrun.engine.core import EngineError, Group, Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.prefixes import BLOCK, Match
from batchrun.engine.sharing import SharedPrefixes


class WaitingQueue:
    """Sequences without a slot, in order; those that begin alike are beside each other.

    Args:
        prefixes: What slots have of their tokens; told what is waited for.
    """

    def __init__(self, prefixes: SharedPrefixes) -> None:
        self._prefixes = prefixes
        self._queue: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        """A sequence that has not run yet."""
        self._prefixes.read(sequence)
        self._insert(self._prefixes.place(sequence, self._queue), sequence)

    def add_again(self, sequence: Sequence) -> None:
        """A sequence that has run, before those that have not and those that came later.

        Else beams of a younger row would be computed before those that elder ones wait for.
        """
        place = 0
        for other in self._queue:
            if not other.high_water or other.arrived >= sequence.arrived:
                break
            place += 1
        self._prefixes.read(sequence)
        self._insert(place, sequence)

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer."""
        self._queue.remove(sequence)
        self._prefixes.unwant(sequence)

    def first(self, groups: Collection[Group], places: int) -> tuple[Sequence, Match] | None:
        """Who is to be admitted, and where most of its tokens are.

        Args:
            groups: Those that have begun: they have places for all that is theirs.
            places: For sequences of others.
        """
        for sequence in self._queue:
            if sequence.group in groups:
                if sequence.idle:
                    continue
            elif sequence.width > places:
                if not groups:
                    break
                places = 0  # none but those of groups begun overtakes it
                continue
            match, coming = self._prefixes.match(sequence)
            if coming - match.num_ready < BLOCK:
                return sequence, match
            # else a running one computes what it needs: share it then
        return None

    def num_tokens(self, count: int, most: int) -> int:
        """Tokens of the first `count` sequences, `most` at most."""
        tokens = 0
        for i, sequence in enumerate(self._queue):
            if i >= count or tokens >= most:
                break
            tokens += sequence.num_tokens
        return min(tokens, most)

    def _insert(self, place: int, sequence: Sequence) -> None:
        self._queue.insert(place, sequence)
        self._prefixes.want(sequence)


def why_refused(
    prompt_tokens: int,
    beams: int,
    *,
    max_model_len: int,
    max_num_seqs: int,
    can_fit: Callable[[int], bool],
) -> tuple[str, str] | None:
    """Why a row can never be computed: a kind of failure, and the reason. None where it can."""
    if prompt_tokens + 1 > max_model_len:
        return (
            "prompt_too_long",
            f"the prompt has {prompt_tokens} tokens and the context holds "
            f"{max_model_len}, one of them for the answer",
        )
    if not can_fit(prompt_tokens + 1):
        return (
            "kv_budget",
            f"the prompt has {prompt_tokens} tokens, whose keys and values "
            "exceed the KV budget; raise --kv-budget",
        )
    if beams > max_num_seqs:
        return (
            "bad_parameter",
            f"the row has {beams} beams and {max_num_seqs} sequences run at "
            "once; raise --max-num-seqs or lower --num-beams",
        )
    return None


def check_machine(space: KVSpace) -> None:
    """Nothing can be computed for want of memory: if it is the machine's, no row is to blame.

    Raises:
        EngineError: It is.
    """
    if space.refusal:
        raise EngineError(
            f"there is no memory for a single row: {space.refusal}",
            hint="what is done is kept; then: batchrun resume",
        )
