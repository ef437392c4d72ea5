"""What must hold of a scheduler between steps."""

from collections import Counter

from batchrun.engine.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    running, waiting = scheduler.running, list(scheduler.waiting)
    slots = [s.slot for s in running]
    assert None not in slots, "a running sequence has no slot"
    assert len(set(slots)) == len(slots), f"a slot is used twice: {slots}"
    prefixes = scheduler._prefixes
    assert prefixes._owners == {s.slot: s for s in running}, "slots are another's"
    assert not prefixes._kept.keys() & prefixes._owners.keys(), "a slot is kept and runs"
    wanted = Counter(block for s in waiting for block in s.blocks)
    assert dict(prefixes._wanted) == wanted, "blocks of waiting sequences"
    assert scheduler.stays._by_key == {s.key: s for s in running}, "stays are another's"
    assert scheduler._places() >= 0
    beams = {s for group in scheduler._groups for s in group.sequences}
    assert beams == {s for s in (*running, *waiting) if s.group in scheduler._groups}
    assert len(running) <= scheduler.max_num_seqs
    for sequence in running:
        assert 0 <= sequence.num_computed_tokens <= sequence.num_tokens
        assert not sequence.num_drafts or sequence.num_pending == 1
    for sequence in waiting:
        assert sequence.slot is None
        assert sequence.num_computed_tokens == sequence.num_pending == sequence.num_drafts == 0
