"""Which sequence is in which slot, and until when steps use its memory."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from batchrun.allocator.sharing import MemoryCopy
from batchrun.engine.core import Segment, Sequence
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.plan import NewSequence
from batchrun.engine.prefixes import SharedPrefixes
from batchrun.engine.speculation.proposers import Proposer


class Stays:
    """The stays of sequences in slots, each identified by a key (see `Segment`).

    Args:
        space: Where keys and values are stored.
        prefixes: Which tokens the slots hold.
        proposer: Told when stays begin and end; proposes draft tokens for them.

    Attributes:
        num_shared_tokens: Tokens that sequences already had when they entered their slots.
        num_recomputed_tokens: Tokens that had been computed before, in earlier stays.
    """

    def __init__(
        self, space: KVSpace, prefixes: SharedPrefixes, proposer: Proposer | None = None
    ) -> None:
        self.num_shared_tokens = self.num_recomputed_tokens = 0
        self.proposer = proposer
        self._space, self._prefixes = space, prefixes
        self._by_key: dict[int, Sequence] = {}
        self._new: dict[int, Sequence] = {}  # not yet in a plan
        self._uncopied = set[int]()  # forks' slots, until the copies ordered for them are made
        self._used: dict[int, int] = {}  # slot -> the last step that may read or write its pages

    def owners(self, segments: Iterable[Segment]) -> list[Sequence | None]:
        """The sequence of each segment; None if it has ended since."""
        get = self._by_key.get
        return [get(segment.key) for segment in segments]

    def begin(self, sequence: Sequence, slot: int, source: int, shared: int) -> None:
        """Put a sequence into a slot that already has its first tokens, from another slot."""
        self._prefixes.begin(sequence, slot, source, shared)
        if shared:  # the step that wrote those pages must have ended
            self._used[slot] = max(self._used.get(slot, 0), self._used.get(source, 0))
        self.num_shared_tokens += shared
        self._by_key[sequence.key] = self._new[sequence.key] = sequence
        sequence.slot, sequence.num_computed_tokens = slot, shared
        if self.proposer is not None:
            self.proposer.open(sequence)

    def end(self, sequence: Sequence, step: int, *, keep: bool = False) -> None:
        """Take a sequence out of its slot; what it holds can be shared until its memory is taken.

        Args:
            sequence: The sequence.
            step: The last step that may read the slot.
            keep: Whether what waiting sequences need of it stays until `SharedPrefixes` drops it.
        """
        if self.proposer is not None:
            self.proposer.close(sequence)
        slot = slot_of(sequence)
        kept = self._prefixes.worth_keeping(slot) if keep else 0
        self._space.close(slot, step, kept)
        self._prefixes.leave(slot, kept)
        del self._by_key[sequence.key]
        self._new.pop(sequence.key, None)
        sequence.slot, sequence.num_computed_tokens = None, 0

    def interrupt(self, sequence: Sequence, step: int) -> None:
        """As `end`, for a sequence that will continue: others may share what it has computed."""
        slot, computed = slot_of(sequence), sequence.num_computed_tokens
        self.end(sequence, step)
        if slot not in self._uncopied:
            self._prefixes.note(slot, sequence, computed)

    def fork(self, child: Sequence, parent: Sequence, step: int) -> tuple[int, int] | None:
        """Share all of a child's tokens but the last with its parent, in a new slot.

        Args:
            child: A sequence without a slot.
            parent: The sequence whose tokens it has, except for the last one.
            step: The next step.

        Returns:
            The slot and the parent's slot. None if there is no slot: the tokens are then
            recomputed.
        """
        source, shared = parent.slot, child.num_tokens - 1
        if source is None:
            return None
        slot = self._space.share(source, shared, child.num_tokens, step)
        if slot is None:  # more may be shared of it later
            self._prefixes.note(source, parent, shared)
            return None
        self._uncopied.add(slot)
        return slot, source

    def take_copies(self) -> tuple[tuple[MemoryCopy, ...], int]:
        """The copies ordered, and the last step that uses what they read and write."""
        self._uncopied.clear()
        copies = self._space.take_copies()
        return copies, max((self._used.get(s, 0) for c in copies for s in c.slots), default=0)

    def launch(self, segments: Seq[Segment], step: int) -> tuple[NewSequence, ...]:
        """Count what a step computes as computed, and what it samples as pending.

        Returns:
            The sequences that are in a plan for the first time.
        """
        for segment in segments:
            sequence, start = self._by_key[segment.key], segment.start
            end, high = start + segment.length - segment.num_drafts, sequence.high_water
            if start < high:
                self.num_recomputed_tokens += min(end, high) - start
            if end > high:
                sequence.high_water = end
            sequence.num_computed_tokens = end
            if segment.sampled and sequence.group is None:
                sequence.num_pending += 1
                sequence.num_drafts = segment.num_drafts
            self._used[segment.slot] = step
        if not self._new:
            return ()
        new = [self._new.pop(s.key) for s in segments if s.key in self._new]
        return tuple(NewSequence(slot_of(s), s.request, tuple(s.output_ids)) for s in new)

    def collect(self, segments: Seq[Segment]) -> None:
        """Note that the tokens of a step are known."""
        for segment, sequence in zip(segments, self.owners(segments), strict=True):
            if segment.sampled and sequence is not None and sequence.group is None:
                if sequence.num_ignored:
                    sequence.num_ignored -= 1
                else:
                    sequence.num_pending -= 1

    def settle(self, segments: Seq[Segment]) -> None:
        """Count a step's accepted draft tokens as computed, once its tokens were taken in."""
        if self.proposer is None:
            return
        sampled = [segment for segment in segments if segment.sampled]
        owners = self.owners(sampled)
        self.proposer.settle(filter(None, owners))
        for segment, sequence in zip(sampled, owners, strict=True):
            if segment.num_drafts and sequence is not None:
                assert not sequence.num_pending, "a step was planned upon draft tokens"
                sequence.num_drafts = 0
                sequence.num_computed_tokens = sequence.num_known_tokens - 1
                sequence.high_water = max(sequence.high_water, sequence.num_computed_tokens)


def next_segment(sequence: Sequence, start: int, length: int) -> Segment:
    """The tokens `[start, start + length)` of a running sequence, the next to compute."""
    todo, scoring = sequence.num_tokens - start, sequence.scoring
    ids = () if todo <= sequence.num_pending else sequence.token_ids(start, length)
    targets = () if scoring is None else scoring.targets(start, length)
    sampled = length == todo and scoring is None
    slot, key, inherited = slot_of(sequence), sequence.key, sequence.inherited
    return Segment(slot, start, length, sampled, ids, 0, key, inherited, targets)


def slot_of(sequence: Sequence) -> int:
    """The slot of a running sequence."""
    assert sequence.slot is not None
    return sequence.slot
