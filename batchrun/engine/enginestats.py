"""What an engine counts and measures of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counts and measured seconds of an engine's life; a mixed step's time is split by tokens.

    Its fields have the names of `batchrun.jobs.metrics`.

    Attributes:
        decode_tokens: Those computed behind prompts, but for wrong draft tokens.
        drafted_tokens, accepted_tokens: Proposed, and those of them that were right.
        map_hidden_s, map_exposed_s: Mapping, unmapping and creating pages while the
            device computed, and while it had nothing to do.
        map_stalls: Times that the device ran out of work while pages were being mapped.
        device_s, idle_s: The device's time in steps, and between one step's end and
            the next one's begin; 0 where the host computes.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
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
