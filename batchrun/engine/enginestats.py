"""What an engine counts and measures of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counts and measured seconds of an engine's life; a mixed step's time is split by tokens.

    Attributes:
        seconds: Wall time in which at least one step was under way.
        decode_tokens: Those computed behind prompts, but for wrong guesses.
        drafted_tokens, accepted_tokens: Guessed, and those of them that were right.
        map_hidden_seconds, map_exposed_seconds: Mapping, unmapping and creating pages while the
            device computed, and while it had nothing to do.
        map_stalls: Times that the device ran out of work while pages were being mapped.
        device_seconds, idle_seconds: The device's time in steps, and between one step's end and
            the next one's begin; 0 where the host computes.
    """

    steps: int = 0
    seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    sequence_seconds: float = 0.0
    map_hidden_seconds: float = 0.0
    map_exposed_seconds: float = 0.0
    map_stalls: int = 0
    device_seconds: float = 0.0
    idle_seconds: float = 0.0
