"""Gets a model ready to compute: its modules, and its executor over the slots of an arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from batchrun.allocator.arena import KVArena
from batchrun.allocator.tensor import layer_views, slab_bytes
from batchrun.engine import attention
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.model import invariant
from batchrun.engine.model.optimize import optimize
from batchrun.engine.model.prepare import LoadedModel
from batchrun.engine.settings import Settings, geometry_of, no_backend
from batchrun.engine.transfers import Transfers


def make_fast(
    loaded: LoadedModel, settings: Settings, log: Callable[[str], None]
) -> tuple[str, ...]:
    """Make a model faster in place, and its rows alike; returns what was replaced.

    Raises:
        ModelError: See `optimize`.
    """
    cuda, deterministic = loaded.device.type == "cuda", settings.deterministic
    made: tuple[str, ...] = ()
    if settings.optimize or (deterministic and cuda):
        made = optimize(loaded.model, compile=cuda, log=log, deterministic=deterministic)
    if not cuda and invariant.repair(loaded.model, slowly=deterministic):
        made = (*made, "rows alike")
    return made


def make_executor(
    loaded: LoadedModel,
    arena: KVArena,
    settings: Settings,
    transfers: Transfers,
    log: Callable[[str], None],
    *,
    first_layer: int = 0,
    drafts: int = 0,
    **options: Any,
) -> TorchExecutor:
    """An executor with the best attention kernels for a model.

    Args:
        loaded: The model.
        arena: Has its layers, from `first_layer` on.
        settings: How to run it.
        transfers: Moves data to its device and back.
        log: Called with each line that the user should see.
        first_layer: Above 0 for a draft model, whose layers follow the model's.
        drafts: Draft tokens of a step that are segments of their own.
        options: Arguments of `TorchExecutor`: `lag`, `relieve` and `config`.

    Raises:
        EngineError: An attention backend requested by name can't be used.
    """
    limits = settings.limits(str(loaded.device))
    geometry = geometry_of(loaded, limits, arena.layout.slot_tokens, arena.num_slots)
    most = limits.max_num_seqs + drafts
    geometry = replace(geometry, max_num_seqs=most, deterministic=settings.deterministic)
    try:
        backend = attention.create(settings.attention, geometry, transfers.upload, log)
    except ValueError as error:
        raise no_backend(error) from error
    layers = range(first_layer, first_layer + len(loaded.layers))
    views = [layer_views(arena, i, loaded.dtype, loaded.device) for i in layers]
    groups = range(arena.layout.num_groups)
    slabs = [slab_bytes(arena, group, loaded.device) for group in groups]
    return TorchExecutor(loaded, views, slabs, backend, transfers, **options)
