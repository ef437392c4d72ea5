"""What an engine counts and measures about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counts and measured seconds over an engine's life; a mixed step's time is split by tokens.

    The fields are named as in `batchrun.jobs.metrics`.

    Attributes:
        decode_tokens: Tokens computed after prompts, without rejected draft tokens.
        drafted_tokens, accepted_tokens: Draft tokens proposed, and those accepted.
        forced_tokens: Generated tokens that a constraint left no alternative to, appended as such.
        map_hidden_s, map_exposed_s: Time spent mapping, unmapping and creating pages while the
            device computed, and while it was idle.
        map_stalls: How often the device ran out of work while pages were being mapped.
        device_s, idle_s: The device's time in steps, and between the end of one step and the start
            of the next; 0 if the host computes.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sequence_s: float = 0.0
    map_hidden_s: float = 0.0
    map_exposed_s: float = 0.0
    map_stalls: int = 0
    device_s: float = 0.0
    idle_s: float = 0.0
