"""torch's own flash attention kernels: variable lengths over slots, one launch, no extra wheel.

They support ragged batches (FlashAttention-2, https://arxiv.org/abs/2307.08691): each sequence has
a start in one tensor of tokens, and a length. The slots form such a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from batchrun.engine.attention import KV, AttentionBackend, Geometry, LayerAttention, Upload
from batchrun.engine.attention.batch import (
    Batch,
    Ints,
    Staging,
    device_unsupported,
    geometry_unsupported,
    split,
)
from batchrun.engine.core import Segment

Kernel = Callable[..., tuple[torch.Tensor, ...]]


def unsupported_reason(geometry: Geometry, name: str, *, compiled: bool) -> str | None:
    """See `attention.unsupported_reason`."""
    if geometry.num_slots * geometry.slot_tokens >= 2**31:
        return "its 32-bit indices can't cover the address space of all slots"
    reason = geometry_unsupported(geometry, range(8, 257, 8), softcap=False)
    return reason or device_unsupported(geometry)


def make(geometry: Geometry, upload: Upload, log: Callable[[str], None], name: str) -> TorchFlash:
    """See `attention.create`."""
    return TorchFlash(geometry, upload, torch.ops.aten._flash_attention_forward)


@dataclass(frozen=True)
class _Launch:
    """Arguments of one launch: queries `[starts]`, keys `[key_starts, key_starts + used)`."""

    starts: torch.Tensor
    key_starts: torch.Tensor
    used: torch.Tensor
    max_q: int
    max_k: int
    causal: bool


class TorchFlash(AttentionBackend):
    """One launch for the decodes of a step and one for its prefills.

    Args:
        geometry: What it is made for.
        upload: How arrays get to the device.
        kernel: `aten::_flash_attention_forward`, or something that takes the same arguments.
    """

    name = "torch-flash"
    capturable = True

    def __init__(self, geometry: Geometry, upload: Upload, kernel: Kernel) -> None:
        self._slot_tokens = geometry.slot_tokens
        self._windows = sorted({layer.window or 0 for layer in geometry.layers})
        capacity = (1 + 2 * len(self._windows)) * (geometry.max_num_seqs + 1)
        self._staging = Staging(upload, capacity, geometry.device)
        self._kernel = kernel
        self._num_decodes = 0
        self._decodes: dict[int, _Launch] = {}
        self._prefill: _Launch | None = None

    def plan(self, segments: Sequence[Segment], *, fixed: bool = False) -> None:
        """See `AttentionBackend.plan`."""
        decodes, prefills = split(segments)
        if fixed and len(prefills):
            raise ValueError("a fixed plan takes single tokens only")
        self._num_decodes = len(decodes)
        arrays, longest = [decodes.starts], []
        for window in self._windows:
            # A decode's window is passed as a shorter sequence that starts later in the slot: only
            # without a window does the kernel fold heads that share keys and split sequences.
            used = np.minimum(decodes.ends, window or self._slot_tokens)
            arrays += [self._key_starts(decodes, decodes.ends - used), used]
            longest.append(int(used.max(initial=1)))
        if len(prefills):
            arrays += [prefills.starts, self._key_starts(prefills), prefills.ends]
        starts, *sent = self._staging.put(arrays, fixed=fixed)
        for i, window in enumerate(self._windows):
            # The maximum key length decides how the kernel splits the work; a graph fixes it.
            max_k = min(window or self._slot_tokens, self._slot_tokens) if fixed else longest[i]
            launch = _Launch(starts, sent[2 * i], sent[2 * i + 1], 1, max_k, causal=False)
            self._decodes[window] = launch
        self._prefill = None
        if len(prefills):
            maxima = int(prefills.lengths.max()), int(prefills.ends.max())
            self._prefill = _Launch(sent[-3], sent[-2], sent[-1], *maxima, causal=True)

    def run(
        self, layer: LayerAttention, query: torch.Tensor, slots: KV, new: KV | None = None
    ) -> torch.Tensor:
        """See `AttentionBackend.run`."""
        tokens = [tensor.view(-1, *tensor.shape[2:]) for tensor in slots]
        at, outputs = self._num_decodes, []
        if at:
            launch = self._decodes[layer.window or 0]
            outputs.append(self._launch(launch, layer, query[:at], tokens))
        if self._prefill is not None:
            outputs.append(self._launch(self._prefill, layer, query[at:], tokens))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _launch(
        self,
        launch: _Launch,
        layer: LayerAttention,
        query: torch.Tensor,
        tokens: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        window = {}
        if launch.causal and layer.window is not None:
            window = {"window_size_left": layer.window - 1, "window_size_right": 0}
        return self._kernel(
            query,
            *tokens,
            launch.starts,
            launch.key_starts,
            launch.max_q,
            launch.max_k,
            0.0,  # dropout
            launch.causal,
            False,  # return_debug_mask
            scale=layer.scale,
            seqused_k=launch.used,
            **window,
        )[0]

    def _key_starts(self, batch: Batch, skipped: Ints | int = 0) -> Ints:
        """Row of each segment's first key among all slots' tokens; the last entry is not read."""
        starts = np.zeros(len(batch) + 1, np.int32)
        starts[:-1] = batch.slots * np.int32(self._slot_tokens) + skipped
        return starts
