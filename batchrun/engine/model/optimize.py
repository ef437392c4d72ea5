"""Makes a hooked model faster in place: native code on a CPU, compiled layers on a GPU.

Modules are replaced by others that compute the same: decoder layers and linear layers by native
code where a CPU has it, projections by merged ones, norms by fused ones; and on a GPU each decoder
layer becomes one compiled graph in which attention is a single opaque operator. What can't be done,
or does not give the model's own logits, is left as it was, with one line in the log.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from threading import Thread
from typing import Any, cast

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from batchrun.engine.attention import LayerAttention
from batchrun.engine.cpu import layers as cpu_layers
from batchrun.engine.cpu.layers import NativeLayer
from batchrun.engine.model.adapters import is_adapted
from batchrun.engine.model.fused import FusedNorm, Projection, Undo, fuse_norms, merge_projections
from batchrun.engine.model.hook import HOOK, Step, hook, is_told_beside
from batchrun.engine.model.prepare import has_experts
from batchrun.errors import ModelError

_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit
_HALF_TOLERANCE = 0.06  # as the canary's: sums in another order, rounded at other places
# Rounding adds up over layers: those that were judged one by one leave little to judge together.
_LOOSE_TOLERANCE = 0.25
_LINEAR_TOLERANCE = 0.01  # of bfloat16, whose own rounding is some 0.002
# Tokens to compile with: equal to no dimension of a model, or the graph would take both for one.
_TOKENS, _FEWER_TOKENS = 251, 17
_STATIC = ("default", "linear", "llama3", "yarn")  # frequencies that depend on no sequence


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
    want = _logits(model, _FEWER_TOKENS)
    native = _can_be_native(model, log)
    if native:
        _use_native_layers(model)
    calls = _layer_calls(model)
    undo: Undo = []
    try:
        merge_projections(model, lambda: _logits(model, _FEWER_TOKENS), undo)
        fuse_norms(model, undo)
        _check(model, want, calls)
    except Exception as error:  # whatever a model does with modules that it does not know
        for parent, name, module in undo:
            setattr(parent, name, module)
        log(f"the model's modules stay as they are, because fused ones fail: {_brief(error)}")
    if native:
        try:
            _use_native_parts(model)
            if not has_experts(model):  # in which each part that agrees may still sway a router
                _check(model, want)
        except ValueError as error:  # their old weights are gone
            raise ModelError(
                f"native code computes {type(model).__name__} wrongly: {error}",
                hint="run it by torch's operators: --no-optimize",
            ) from error
    if compile and (is_told_beside(model) or is_adapted(model)):
        log("the model's layers run uncompiled: how they attend is not all in their own code")
    elif compile and not _compiled_layers(model):
        try:
            with warnings.catch_warnings():
                # Inductor advises TF32 for float32 models, which would change their tokens.
                warnings.simplefilter("ignore")
                _compile_layers(model, log)
                _logits(model, _TOKENS)
            with torch.compiler.set_stance("fail_on_recompile"):
                _check(model, want, calls)
        except Exception as error:  # no compiler, no triton, or a layer that can't be one graph
            _uncompile(model, log, error)
        _Compilers.end()
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
        "compiled layers": bool(_compiled_layers(model)),
    }
    return tuple(name for name, there in found.items() if there)


# --- decoder layers as one graph each ---

# The call that the attention operator of the running layer stands for: a graph can hold neither
# the step nor the layer's number, or each layer would need a graph of its own.
_CALL: ContextVar[tuple[Step, int, LayerAttention]] = ContextVar("batchrun_attention_call")
_LIBRARY = torch.library.Library("batchrun", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value) -> Tensor",
    tags=[torch.Tag.needs_exact_strides],
)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Tensors `[1, H, T, D]` as transformers has them, to `[1, T, Hq, Dv]`."""
    step, index, layer = _CALL.get()
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return step.attend(index, layer, *packed)[None].contiguous()


def _attend_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("batchrun::attend", _attend_shape, lib=_LIBRARY)


class _Traced:
    """Stands for the step while a layer is compiled: one object, so that all layers look alike."""


_TRACED = _Traced()


def _traceable_hook(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batchrun_step: Step | _Traced | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The model's hook; in a compiled layer, the operator in its place."""
    if isinstance(batchrun_step, _Traced):
        return torch.ops.batchrun.attend(query, key, value), None
    return hook(module, query, key, value, attention_mask, batchrun_step=batchrun_step, **kwargs)


class _Layer:
    """What a decoder layer's call becomes.

    Without our step (in `generate`, or under another attention), and for a single token, which
    would need a graph of its own, the layer runs as it was.
    """

    def __init__(
        self,
        layer: nn.Module,
        compiled: Callable[..., Any],
        index: int,
        attention: LayerAttention,
        failed: Callable[[Exception], None],
    ) -> None:
        self.layer = layer
        self.compiled = compiled
        self.index = index
        self.attention = attention
        self.failed = failed

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        step = kwargs.get("batchrun_step")
        if step is None or hidden_states.shape[1] == 1:
            return self.layer._call_impl(hidden_states, *args, **kwargs)
        token = _CALL.set((step, self.index, self.attention))
        try:
            traced = {**kwargs, "batchrun_step": _TRACED}
            return self.compiled(self.layer, hidden_states, *args, **traced)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.failed(error)
            return self.layer._call_impl(hidden_states, *args, **kwargs)
        finally:
            _CALL.reset(token)


def _compile_layers(model: PreTrainedModel, log: Callable[[str], None]) -> None:
    """Have each decoder layer compiled at its next call; one graph serves all of a class.

    Only the layers are: their graph is small, and the rest of a forward is a few operators.
    """
    _Compilers.ready()
    layers, attentions = _decoder_layers(model)
    AttentionInterface.register(HOOK, _traceable_hook)
    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True, dynamic=True)
        for kind in {type(layer) for layer in layers}
    }
    failed = partial(_uncompile, model, log)
    for i, layer in enumerate(layers):
        layer._compiled_call_impl = _Layer(layer, compiled[type(layer)], i, attentions[i], failed)


class _Compilers:
    """Torch's compile processes, for whose end our own process would wait seconds at its own."""

    _ending: Thread | None = None

    @classmethod
    def ready(cls) -> None:
        """Wait until those are gone that were told to end: torch would still ask them."""
        if cls._ending is not None:
            cls._ending.join()

    @classmethod
    def end(cls) -> None:
        """Let them end beside whatever comes next."""
        cls._ending = Thread(target=cls._end, name="end-compilers", daemon=True)
        cls._ending.start()

    @staticmethod
    def _end() -> None:
        from torch._inductor.async_compile import (  # noqa: PLC0415 - slow, and loaded by now
            shutdown_compile_workers,
        )

        shutdown_compile_workers()


def _compiled_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m._compiled_call_impl, _Layer)]


def _uncompile(model: PreTrainedModel, log: Callable[[str], None], error: Exception) -> None:
    for layer in _compiled_layers(model):
        layer._compiled_call_impl = None
    log(f"the model's layers run uncompiled, because compiling them fails: {_brief(error)}")


def _decoder_layers(model: PreTrainedModel) -> tuple[nn.ModuleList, dict[int, LayerAttention]]:
    """The model's list of layers, and what each asks of attention."""
    probe = _Causal()
    _logits(model, _FEWER_TOKENS, probe)
    wanted = [{i} for i in range(len(probe.layers))]
    stacks = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and [_layer_numbers(layer) for layer in m] == wanted
    ]
    if len(stacks) != 1:
        raise ValueError(f"{len(stacks)} lists of decoder layers found")
    return stacks[0], probe.layers


def _layer_numbers(layer: nn.Module) -> set[int]:
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return {number for number in found if isinstance(number, int)}


# --- native code on a CPU ---


def _can_be_native(model: PreTrainedModel, log: Callable[[str], None]) -> bool:
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    reason = cpu_layers.unsupported_reason()
    if reason is not None:
        log(f"layers are computed by torch, not by native code: {reason}")
    return reason is None


def _use_native_layers(model: PreTrainedModel) -> None:
    """Replace the decoder layers that native code computes the same, one after the other.

    Their old weights are dropped: there is no way back, and no moment with all weights twice.
    """
    if any(isinstance(module, cpu_layers.NativeStack) for module in model.modules()):
        return
    calls = _layer_calls(model)
    if not calls:  # it is built in some way of its own
        return
    layers, attentions = _decoder_layers(model)
    for i, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        try:
            native = NativeLayer(layer, i, attentions[i])
        except ValueError:
            continue
        if _same(native, *call):
            layers[i] = native
    all_native = [layer for layer in layers if isinstance(layer, NativeLayer)]
    shapes = {(*layer.heads, layer.dim) for layer in all_native}
    if len(all_native) == len(layers) and len(shapes) == 1:
        _join(model, layers, all_native)


def _join(model: PreTrainedModel, layers: nn.ModuleList, native: list[NativeLayer]) -> None:
    """Make one module of a model's native layers, which all get the same positions."""
    del layers[1:]
    layers[0] = cpu_layers.NativeStack(native)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if getattr(child, "rope_type", None) in _STATIC and hasattr(child, "inv_freq"):
                setattr(parent, name, cpu_layers.RotaryTable(child))


def _use_native_parts(model: PreTrainedModel) -> None:
    """Replace norms and linear layers: the last ones, and those of layers built otherwise."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedNorm):
                child.use_native()
            elif cpu_layers.fits(child):
                native = cpu_layers.NativeLinear(cast("nn.Linear", child))
                _check_linear(child, native)
                setattr(parent, name, native)


@torch.inference_mode()
def _check_linear(linear: nn.Module, native: nn.Module) -> None:
    """Raise ValueError unless both compute the same of random numbers, to bfloat16's precision."""
    width = int(linear.in_features)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_FEWER_TOKENS, width, generator=generator).to(torch.bfloat16)
    want, got = linear(x).float(), native(x).float()
    off = float(torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want))
    if not (off <= _LINEAR_TOLERANCE or not want.any()):
        raise ValueError(f"a linear layer is off by {off:.2g} of its result")


# --- forward passes to judge by ---

LayerCall = tuple[torch.Tensor, dict[str, Any], torch.Tensor]  # input, keywords, output


def _layer_calls(model: PreTrainedModel) -> list[LayerCall]:
    """How a forward calls each decoder layer; nothing where a call does not say all it takes."""
    if is_told_beside(model):
        return []
    try:
        layers, _ = _decoder_layers(model)
    except ValueError:
        return []
    calls: list[LayerCall] = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out: calls.append((args[0], kwargs, out)), with_kwargs=True
        )
        for layer in layers
    ]
    _logits(model, _FEWER_TOKENS)
    for handle in handles:
        handle.remove()
    return calls if all(isinstance(out, torch.Tensor) for _, _, out in calls) else []


@torch.inference_mode()
def _same(layer: nn.Module, x: torch.Tensor, kwargs: dict[str, Any], want: torch.Tensor) -> bool:
    """Whether a layer computes what another one did, to its dtype's precision, token by token."""
    try:
        got = layer(x, **kwargs).float()
    except (TypeError, ValueError, RuntimeError):  # it is called otherwise
        return False
    part = 0.05 if x.dtype.itemsize < 4 else 1e-3
    off, change = (torch.linalg.vector_norm(t, dim=-1) for t in (got - want, want.float() - x))
    norm = torch.linalg.vector_norm(x.float(), dim=-1)
    return bool((off <= part * change + part / 5 * norm).all())


class _Causal:
    """A step of one sequence without a cache, whose attention need only be the same each time."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}

    def attend(
        self,
        layer_index: int,
        layer: LayerAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        self.layers[layer_index] = layer
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: int, step: Step | None = None) -> torch.Tensor:
    """Logits after a made-up sequence of so many tokens, float32 `[V]`."""
    vocab = model.config.get_text_config().vocab_size
    positions = torch.arange(tokens, device=model.device)[None]
    output = model(
        input_ids=(positions + 3) * 7919 % vocab,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=torch.tensor([tokens - 1], device=model.device),
        batchrun_step=step or _Causal(),
    )
    logits: torch.Tensor = output.logits[0, 0].float()
    return logits


def _check(model: PreTrainedModel, want: torch.Tensor, calls: Sequence[LayerCall] = ()) -> None:
    """Raise ValueError unless layers and logits are still what they were.

    Args:
        model: The model, maybe changed.
        want: Its logits before.
        calls: Its layers' calls before, where they are known.
    """
    if calls:
        for i, (layer, call) in enumerate(zip(_decoder_layers(model)[0], calls, strict=True)):
            if not _same(layer, *call):
                raise ValueError(f"layer {i} computes something else")
    got = _logits(model, _FEWER_TOKENS)
    difference = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
    tolerance = _TOLERANCE.get(model.dtype, _LOOSE_TOLERANCE if calls else _HALF_TOLERANCE)
    if not difference <= tolerance:  # also refuses NaN
        raise ValueError(
            f"logits differ by {difference:.2g} of the largest, more than {tolerance:.2g}"
        )


def _brief(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # a failed compiler's first line has no reason
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
