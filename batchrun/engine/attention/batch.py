"""A step's segments as arrays, and arrays on the device: what every kernel library needs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchrun.engine.attention import Geometry, Upload
from batchrun.engine.core import Segment

CHUNKS = "it does not support chunked attention"
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Segments of one kernel launch. Each attends to the tokens `[0, ends)` of its slot.

    Args:
        slots: Each segment's slot.
        lengths: Each segment's number of tokens, which are the last ones before its end.
        ends: Tokens in each slot once the segment is written.
    """

    slots: Ints
    lengths: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def starts(self) -> Ints:
        """Where each segment's queries begin in the launch, and where the last one ends."""
        return cumulative(self.lengths)


def together(segments: Sequence[Segment]) -> Batch:
    """All segments as one launch."""
    slots = np.array([s.slot for s in segments], np.int32)
    lengths = np.array([s.length for s in segments], np.int32)
    return Batch(slots, lengths, np.array([s.start for s in segments], np.int32) + lengths)


def split(segments: Sequence[Segment]) -> tuple[Batch, Batch]:
    """The leading single-token segments, and all others: kernels are fastest with them apart."""
    batch = together(segments)
    slots, lengths, ends = batch.slots, batch.lengths, batch.ends
    longer = np.flatnonzero(lengths > 1)
    at = int(longer[0]) if len(longer) else len(segments)
    return Batch(slots[:at], lengths[:at], ends[:at]), Batch(slots[at:], lengths[at:], ends[at:])


@dataclass(frozen=True)
class SharedParts:
    """Parts of a fixed number of tokens that several single-token segments have in common.

    Args:
        part: For each, its index among the parts of its sequences; `[n]`.
        starts: Where the members of each begin, and where the last one's end; `[n + 1]`.
        members: The segments that share each part.
        own: Each segment's first part that it does not share; `[segments]`.
    """

    part: Ints
    starts: Ints
    members: Ints
    own: Ints


def shared_parts(segments: Sequence[Segment], size: int) -> SharedParts | None:
    """What decodes have in common, in parts of `size` tokens; None if nothing.

    Tokens are in common if they were shared from one stay in a slot (`Segment.inherited`). Segments
    that have a part in common also have everything before it in common.
    """
    origins = {origin for s in segments for _, origin in s.inherited}
    if not origins:
        return None
    found: dict[tuple[int, int], list[int]] = {}
    for i, segment in enumerate(segments):
        if segment.length == 1:
            first = 0
            for end, origin in (*segment.inherited, (segment.start, segment.key)):
                last = min(end, segment.start) // size
                if origin in origins:
                    for part in range(first, last):
                        found.setdefault((part, origin), []).append(i)
                first = last
    shared = {key: members for key, members in found.items() if len(members) > 1}
    if not shared:
        return None
    own = np.zeros(len(segments), np.int32)
    for members in shared.values():
        own[members] += 1
    return SharedParts(
        np.array([part for part, _ in shared], np.int32),
        cumulative(np.array([len(members) for members in shared.values()], np.int32)),
        np.array([i for members in shared.values() for i in members], np.int32),
        own,
    )


def cumulative(lengths: NDArray[Any]) -> Ints:
    """Running sums with a leading 0: `[n]` to `[n + 1]`."""
    sums = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=sums[1:])
    return sums


class Staging:
    """Puts arrays on the device, with one upload for all of them.

    Args:
        upload: See `Upload`.
        capacity: Maximum number of integers in fixed arrays.
        device: Where they go.
    """

    def __init__(self, upload: Upload, capacity: int, device: torch.device) -> None:
        self._upload = upload
        self._capacity = capacity
        self._device = device
        self._buffer: torch.Tensor | None = None

    def put(self, arrays: Sequence[Ints], *, fixed: bool) -> list[torch.Tensor]:
        """Put arrays on the device, as tensors.

        Fixed ones lie at the same addresses in every call whose arrays, except for the last, have
        the same lengths; they are valid until the next such call.
        """
        if fixed and self._buffer is None:
            self._buffer = torch.empty(self._capacity, dtype=torch.int32, device=self._device)
        sent = self._upload(np.concatenate(arrays), self._buffer if fixed else None)
        return list(sent.split([len(array) for array in arrays]))


def geometry_unsupported(geometry: Geometry, dims: Container[int], *, softcap: bool) -> str | None:
    """Why half-precision CUDA kernels for these head widths can't serve; None if they can."""
    if geometry.device.type != "cuda":
        return "it needs a CUDA device"
    if geometry.dtype not in {torch.bfloat16, torch.float16}:
        return f"it computes in bfloat16 and float16, not in {str(geometry.dtype)[6:]}"
    for layer in geometry.layers:
        if layer.k_dim != layer.v_dim or layer.k_dim not in dims:
            return (
                f"it has no kernel for keys of {layer.k_dim} and values of {layer.v_dim} elements"
            )
        if layer.sinks or (layer.softcap is not None and not softcap):
            return f"it has no {'attention sinks' if layer.sinks else 'soft cap on scores'}"
        if layer.chunk is not None:
            return CHUNKS
    return None


def device_unsupported(geometry: Geometry, *, hopper: bool = False) -> str | None:
    """Why a device is too old, or not a Hopper GPU if that is needed; None if it is fine."""
    major, minor = torch.cuda.get_device_capability(geometry.device)
    if (major, minor) >= (8, 0) and (major == 9 or not hopper):
        return None
    wanted = "9.x" if hopper else "8.0 or higher"
    return f"it needs compute capability {wanted}, and this device has {major}.{minor}"
