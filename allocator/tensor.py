"""Torch tensors over an arena's addresses: views that neither copy nor read the memory.

The only module in this package that imports torch.
"""

from collections.abc import Sequence

import torch

from batchrun.allocator.arena import KVArena


def strided_view(
    address: int,
    nbytes: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    *,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """View a range of addresses, any part of which may be unmapped, as a tensor.

    Args:
        address: first byte of the range.
        nbytes: bytes of the range; must contain every element of the view.
        shape: shape of the view.
        strides: in elements, one per dimension.
        dtype: dtype of the elements.
        offset: element of the range at which the view begins.
        device: device that the addresses belong to.

    Returns:
        A tensor that does not own the memory: it is valid until the range is freed, and touching an
        element that has no page is a fault that kills the process.
    """
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if offset < 0 or (last + 1) * dtype.itemsize > nbytes:
        raise ValueError(
            f"a view of shape {tuple(shape)}, strides {tuple(strides)} and offset {offset} "
            f"in {dtype} ends beyond the range of {nbytes} bytes"
        )
    empty = torch.empty(0, dtype=dtype, device=device)  # its device has an index; "cuda" has none
    storage = torch._C._construct_storage_from_data_pointer(address, empty.device, nbytes)
    return empty.set_(storage, offset, shape, strides)


def slab_bytes(arena: KVArena, group: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The slabs of a group, over all slots, as bytes: what `MemoryCopy` offsets index.

    Returns:
        uint8 `[planes, num_slots * slab_size]`; valid until `arena.release()`.
    """
    planes, size = arena.layout.planes, arena.num_slots * arena.layout.slab_size(group)
    return strided_view(
        arena.address(group), planes * size, (planes, size), (size, 1), torch.uint8, device=device
    )


def layer_views(
    arena: KVArena, layer: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one layer, over all slots.

    Touch only tokens that `KVArena.ensure` has backed: `k[slot, :num_tokens]`.

    Returns:
        K as [num_slots, slot_tokens, kv_heads, k_dim] and V as [num_slots, slot_tokens, kv_heads,
        v_dim], strided over the slabs; valid until `arena.release()`. `k.flatten(0, 1)` is a view
        too, because consecutive slots are a whole number of tokens apart.
    """
    layout = arena.layout
    if dtype.itemsize != layout.dtype_bytes:
        raise ValueError(
            f"{dtype} has {dtype.itemsize} bytes, but the layout has {layout.dtype_bytes}"
        )
    shape, (plane, group, _) = layout.layers[layer], layout.place_of(layer)
    token_stride = layout.group_bytes_per_token(group) // dtype.itemsize

    def view(dim: int, offset: int) -> torch.Tensor:
        return strided_view(
            arena.address(group, plane),
            arena.num_slots * layout.slab_size(group),
            (arena.num_slots, layout.slot_tokens, shape.kv_heads, dim),
            (layout.slot_tokens * token_stride, token_stride, dim, 1),
            dtype,
            offset=offset // dtype.itemsize,
            device=device,
        )

    k_offset, v_offset = layout.offsets(layer)
    return view(shape.k_dim, k_offset), view(shape.v_dim, v_offset)
