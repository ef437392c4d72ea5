"""Attention over contiguous slots: one small file for each kernel library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from batchrun.engine.core import Segment


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of attention.

    Args:
        scale: Factor on the scores.
        window: Keys a query sees, itself included; None sees all before it.
        softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
        sinks: One extra logit a query head that takes part in the softmax only, `[Hq]`.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class AttentionBackend(Protocol):
    """A kernel library over slots that are contiguous in virtual memory."""

    name: str

    def plan(self, segments: Sequence[Segment]) -> None:
        """Prepare a step: its segments lie one behind the other in the packed tokens."""

    def run(
        self,
        layer: LayerAttention,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Attend causally, each segment over its own slot.

        Args:
            layer: Scale, window and the like.
            query: `[T, Hq, Dk]`, the planned segments' tokens packed.
            keys: `[num_slots, slot_tokens, Hkv, Dk]`, a strided view; only tokens up to a segment's
                end may be touched, beyond them there is no memory.
            values: `[num_slots, slot_tokens, Hkv, Dv]`, likewise.

        Returns:
            `[T, Hq, Dv]`.
        """


def create(name: str) -> AttentionBackend:
    """Make the backend of that name; `auto` takes the best one for this machine.

    Raises:
        ValueError: There is no such backend; the message lists those there are.
    """
    from batchrun.engine.attention.sdpa import SDPA  # noqa: PLC0415 - torch only when wanted

    backends: dict[str, Callable[[], AttentionBackend]] = {"auto": SDPA, "sdpa": SDPA}
    if name not in backends:
        raise ValueError(f"no attention backend {name!r}; there are {', '.join(backends)}")
    return backends[name]()
