"""Makes a hooked model faster in place: native code on a CPU, compiled layers on a GPU.

Modules are replaced by others that compute the same: decoder and linear layers by native code if
the CPU supports it, projections by merged ones, norms by fused ones; on a GPU each decoder layer
becomes one compiled graph. Every replacement is checked before it stays. One that can't be made,
or changes the model's logits, is dropped with one line in the log; only native code whose logits
are wrong is an error, because the old weights are gone by then.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from batchrun.engine.attention import LayerAttention
from batchrun.engine.cpu import library
from batchrun.engine.cpu.layers import NativeLayer, NativeStack, RotaryTable
from batchrun.engine.cpu.linear import NativeEmbedding, NativeLinear, fits
from batchrun.engine.model.adapters import is_adapted
from batchrun.engine.model.experts import use_native_experts
from batchrun.engine.model.fused import FusedNorm, Projection, Undo, fuse_norms, merge_projections
from batchrun.engine.model.hook import LAYER, current_step
from batchrun.engine.model.int8 import Int8Linear
from batchrun.engine.model.layers import (
    check_linear,
    check_modules,
    decoder_layers,
    logits_of,
    same_layer,
)
from batchrun.engine.model.prepare import has_experts
from batchrun.engine.model.rowwise import RowwiseLinear, make_rowwise
from batchrun.errors import ModelError, said_by
from batchrun.machine import MappedFiles

_STATIC = ("default", "linear", "llama3", "yarn")  # frequencies do not depend on the sequence


def optimize(
    model: PreTrainedModel,
    *,
    compile: bool,  # noqa: A002 - what torch calls it
    log: Callable[[str], None],
    native: bool = True,
    deterministic: bool = False,
) -> tuple[str, ...]:
    """Make a model that `prepare` has hooked faster in place.

    Merged projections have one weight in place of several; other parameters keep their names. A
    second call changes nothing.

    Args:
        model: The model, on its device.
        compile: Whether to compile decoder layers: takes many seconds, and serves only steps of
            more than one token.
        log: Called with a line for each thing that is unavailable and what runs instead.
        native: Whether native code may compute on a CPU.
        deterministic: Whether on a GPU a token's bits must not depend on the tokens beside it;
            nothing is compiled then (decision 29).

    Returns:
        Those that the model now has of `native layers` (on a CPU), `merged projections`,
        `fused norms`, `rowwise layers` and `compiled layers`.

    Raises:
        ModelError: Native code gives different logits from the model's own, or the model can't be
            made deterministic.
    """
    want = logits_of(model)
    native = native and _can_be_native(model, log)
    if native:
        _use_native_layers(model)
    layers = decoder_layers(model)
    undo: Undo = []
    try:
        merge_projections(model, lambda: logits_of(model), undo)
        fuse_norms(model, undo)
        check_modules(model, want, layers)
    except Exception as error:  # a model may do anything with modules that it does not know
        for parent, name, module in undo:
            setattr(parent, name, module)
        log(f"the model's modules are not fused, because fused ones fail: {_brief(error)}")
    undo.clear()  # its modules keep alive the merged weights, which native code packs
    if native:
        try:
            _use_native_parts(model)
            if not has_experts(model):  # there, parts within tolerance may still sway a router
                check_modules(model, want)
        except ValueError as error:  # the old weights are gone
            raise ModelError(
                f"native code computes {type(model).__name__} wrongly: {error}",
                hint="run it with torch's operators: --no-optimize",
            ) from error
    if deterministic and model.device.type == "cuda":
        make_rowwise(model)
        check_modules(model, want)
    elif compile:
        _compile_layers(model, lambda: check_modules(model, want, layers), log)
    if model.device.type == "cuda":
        # Torch caches the old weights' memory in pieces too small for new ones: free it for KV
        # pages. Nor should it count towards a step's peak.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    kinds = {type(module) for module in model.modules()}
    found = {
        "native layers": NativeLayer in kinds,
        "merged projections": Projection in kinds,
        "fused norms": FusedNorm in kinds,
        "rowwise layers": RowwiseLinear in kinds,
        "compiled layers": bool(_compiled_layers(model)),
    }
    return tuple(name for name, there in found.items() if there)


def _can_be_native(model: PreTrainedModel, log: Callable[[str], None]) -> bool:
    """Whether native code can compute this model; logs why not if the CPU is the reason."""
    if model.device.type != "cpu":
        return False
    reason = library.unsupported_reason(model.dtype)
    if reason is not None:
        log(f"layers are computed by torch, not by native code: {reason}")
    return reason is None


def _use_native_layers(model: PreTrainedModel) -> None:
    """Replace, one by one, the decoder layers that native code computes the same.

    Each old layer is dropped at once: there is no way back, but weights are never all held twice.
    Those of one file share a mapping that stays, so its pages are dropped.
    """
    if any(isinstance(module, NativeStack) for module in model.modules()):
        return
    found, files = decoder_layers(model), MappedFiles()
    layers = found.modules
    for i, call in enumerate(found.calls):
        try:
            native = NativeLayer(layers[i], i, found.attention[i])
        except ValueError:
            continue
        if same_layer(native, *call):
            _forget(layers[i], files)
            layers[i] = native
    all_native = [layer for layer in layers if isinstance(layer, NativeLayer)]
    shapes = {(*layer.heads, layer.dim) for layer in all_native}
    if len(all_native) == len(layers) and len(shapes) == 1:
        _join(model, layers, all_native)


def _forget(module: nn.Module, files: MappedFiles) -> None:
    """Drop a module's weights from memory, which nothing reads any more."""
    for parameter in module.parameters():
        files.forget(parameter.data_ptr(), parameter.nbytes)


def _join(model: PreTrainedModel, layers: nn.ModuleList, native: list[NativeLayer]) -> None:
    """Join a model's native layers into one module, and tabulate its rotary embeddings."""
    del layers[1:]
    layers[0] = NativeStack(native)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if getattr(child, "rope_type", None) in _STATIC and hasattr(child, "inv_freq"):
                setattr(parent, name, RotaryTable(child))


def _use_native_parts(model: PreTrainedModel) -> None:
    """Make norms, linear layers and experts native: those of no layer, or of layers that stayed."""
    files = MappedFiles()
    use_native_experts(model, files)
    embeddings = {
        module.weight: (parent, name)
        for parent in model.modules()
        for name, module in parent.named_children()
        if type(module) is nn.Embedding
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedNorm):
                child.use_native()
            elif native := _native_linear(child, model.dtype):
                _forget(child, files)
                setattr(parent, name, native)
                if child.weight in embeddings:
                    owner, of = embeddings.pop(cast("torch.Tensor", child.weight))
                    setattr(owner, of, NativeEmbedding(native))


def _native_linear(module: nn.Module, dtype: torch.dtype) -> NativeLinear | None:
    """A native layer that computes what a linear layer does; None if it is something else.

    Args:
        module: Any module.
        dtype: Of the activations of layers with 8-bit weights.
    """
    plain, linear = type(module) in {nn.Linear, Int8Linear}, module
    if isinstance(module, (nn.Linear, Conv1D)):
        dtype = module.weight.dtype
        if not plain and {name for name, _ in module.named_parameters()} <= {"weight", "bias"}:
            weight = module.weight.data.mT if isinstance(module, Conv1D) else module.weight.data
            n, k = weight.shape
            linear = nn.Linear(k, n, bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), module.bias
    if not fits(linear, dtype) or library.unsupported_reason(dtype) is not None:
        return None
    native = NativeLinear(cast("nn.Linear | Int8Linear", linear), dtype)
    try:
        check_linear(module, native, dtype)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        if plain:
            raise
        return None  # a linear layer by name alone
    return native


# --- compiled layers: each a graph, in which attention is a single opaque operator ---

_TOKENS = 251  # to compile with: not a model's dimension, or the graph would equate the two


@dataclass(eq=False)
class _Layer:
    """Replaces a decoder layer's call.

    Outside a step (in `generate`, or with another attention), and for a single token, which would
    need a graph of its own, the layer runs uncompiled.
    """

    layer: nn.Module
    compiled: Callable[..., Any]
    index: int
    attention: LayerAttention
    failed: Callable[[Exception], None]

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if current_step() is None or hidden_states.shape[1] == 1:
            return self.layer._call_impl(hidden_states, *args, **kwargs)
        token = LAYER.set((self.index, self.attention))
        try:
            return self.compiled(self.layer, hidden_states, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.failed(error)
            return self.layer._call_impl(hidden_states, *args, **kwargs)
        finally:
            LAYER.reset(token)


def _compile_layers(
    model: PreTrainedModel, check: Callable[[], None], log: Callable[[str], None]
) -> None:
    """Compile the decoder layers, with one graph per class; if that fails, log why.

    Only layers are compiled: their graph is small, and the rest of a forward is a few operators.

    Args:
        model: Changed in place.
        check: Raises if the compiled model computes something else.
        log: Called with the reason if nothing is compiled, now or at a later step.
    """
    if is_adapted(model):
        log("the model's layers run uncompiled: batchrun replaces part of their attention code")
        return
    if _compiled_layers(model):
        return
    try:
        with warnings.catch_warnings():
            # Inductor advises TF32 for float32 models, which would change their tokens.
            warnings.simplefilter("ignore")
            _have_compiled(model, log)
            logits_of(model, _TOKENS)
        with torch.compiler.set_stance("fail_on_recompile"):
            check()
    except Exception as error:  # no compiler, no triton, or a layer that can't be one graph
        _uncompile(model, log, error)
    _end_compilers()


def _have_compiled(model: PreTrainedModel, log: Callable[[str], None]) -> None:
    """Set up each layer to be compiled at its next call."""
    wait_for_compilers()
    found = decoder_layers(model)
    if not found.modules:
        raise ValueError("it has no list of decoder layers, or several")
    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True, dynamic=True)
        for kind in {type(layer) for layer in found.modules}
    }
    failed = partial(_uncompile, model, log)
    for i, layer in enumerate(found.modules):
        graph, attention = compiled[type(layer)], found.attention[i]
        layer._compiled_call_impl = _Layer(layer, graph, i, attention, failed)


_ending: list[Thread] = []  # end torch's compile processes, which would delay our exit by seconds


def wait_for_compilers() -> None:
    """Wait until the compile processes have ended: until then torch would still use them."""
    while _ending:
        _ending.pop().join()


def _end_compilers() -> None:
    """End the compile processes in the background."""
    from torch._inductor.async_compile import (  # noqa: PLC0415 - slow, and loaded by now
        shutdown_compile_workers,
    )

    _ending.append(Thread(target=shutdown_compile_workers, name="end-compilers", daemon=True))
    _ending[-1].start()


def _compiled_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that are compiled, or will be at their next call."""
    return [m for m in model.modules() if isinstance(m._compiled_call_impl, _Layer)]


def _uncompile(model: PreTrainedModel, log: Callable[[str], None], error: Exception) -> None:
    for layer in _compiled_layers(model):
        layer._compiled_call_impl = None
    log(f"the model's layers run uncompiled, because compiling them fails: {_brief(error)}")


def _brief(error: Exception) -> str:
    """An error in one line."""
    return said_by(getattr(error, "inner_exception", error))  # the outer one has no reason there
