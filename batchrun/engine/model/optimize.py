"""Makes a hooked model faster in place: native code on a CPU, compiled layers on a GPU.

Modules are replaced by others that compute the same: decoder layers and linear layers by native
code where a CPU has it, projections by merged ones, norms by fused ones; and on a GPU each decoder
layer becomes one compiled graph. What can't be done, or does not give the model's own logits, is
left as it was, with one line in the log.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from batchrun.engine.cpu.layers import NativeLayer
from batchrun.engine.model.compiled import brief, compile_layers, compiled_layers
from batchrun.engine.model.fused import FusedNorm, Projection, Undo, fuse_norms, merge_projections
from batchrun.engine.model.gates import check_modules
from batchrun.engine.model.native import can_be_native, use_native_layers, use_native_parts
from batchrun.engine.model.prepare import has_experts
from batchrun.engine.model.trial import layer_calls, logits_of
from batchrun.errors import ModelError


def optimize(
    model: PreTrainedModel,
    *,
    compile: bool,  # noqa: A002 - what torch calls it
    log: Callable[[str], None],
) -> tuple[str, ...]:
    """Make a model that `prepare` has hooked faster in place.

    Merged projections have one weight in the place of several; other parameters keep their names.
    A second call changes nothing more.

    Args:
        model: The model, on its device.
        compile: Whether decoder layers are compiled: many seconds, and for steps of more than one
            token only.
        log: Told, one line each, what is unavailable and what runs instead.

    Returns:
        What the model has now, of `native layers` (bfloat16 on a CPU), `merged projections`, `fused
        norms` and `compiled layers`.

    Raises:
        ModelError: Native code gives other logits than the model did.
    """
    want = logits_of(model)
    native = can_be_native(model, log)
    if native:
        use_native_layers(model)
    calls = layer_calls(model)
    _fuse(model, lambda: check_modules(model, want, calls), log)
    if native:
        try:
            use_native_parts(model)
            if not has_experts(model):  # in which each part that agrees may still sway a router
                check_modules(model, want)
        except ValueError as error:  # their old weights are gone
            raise ModelError(
                f"native code computes {type(model).__name__} wrongly: {error}",
                hint="run it by torch's operators: --no-optimize",
            ) from error
    if compile:
        compile_layers(model, lambda: check_modules(model, want, calls), log)
    if model.device.type == "cuda":
        # Torch keeps the old weights' memory in pieces too small for the next ones: KV pages can
        # use it. Nor is it any step's peak.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    kinds = {type(module) for module in model.modules()}
    found = {
        "native layers": NativeLayer in kinds,
        "merged projections": Projection in kinds,
        "fused norms": FusedNorm in kinds,
        "compiled layers": bool(compiled_layers(model)),
    }
    return tuple(name for name, there in found.items() if there)


def _fuse(model: PreTrainedModel, check: Callable[[], None], log: Callable[[str], None]) -> None:
    undo: Undo = []
    try:
        merge_projections(model, lambda: logits_of(model), undo)
        fuse_norms(model, undo)
        check()
    except Exception as error:  # whatever a model does with modules that it does not know
        for parent, name, module in undo:
            setattr(parent, name, module)
        log(f"the model's modules stay as they are, because fused ones fail: {brief(error)}")
