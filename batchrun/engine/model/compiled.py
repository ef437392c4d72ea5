"""Decoder layers as compiled graphs, in which attention is a single opaque operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel

from batchrun.engine.attention import LayerAttention
from batchrun.engine.model.adapters import is_adapted
from batchrun.engine.model.hook import CALL, TRACED, is_told_beside
from batchrun.engine.model.trial import decoder_layers, logits_of

_TOKENS = 251  # to compile with: no model's dimension, or the graph would take both for one


@dataclass(eq=False)
class _Layer:
    """What a decoder layer's call becomes.

    Without our step (in `generate`, or under another attention), and for a single token, which
    would need a graph of its own, the layer runs as it was.
    """

    layer: nn.Module
    compiled: Callable[..., Any]
    index: int
    attention: LayerAttention
    failed: Callable[[Exception], None]

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        step = kwargs.get("batchrun_step")
        if step is None or hidden_states.shape[1] == 1:
            return self.layer._call_impl(hidden_states, *args, **kwargs)
        token = CALL.set((step, self.index, self.attention))
        try:
            traced = {**kwargs, "batchrun_step": TRACED}
            return self.compiled(self.layer, hidden_states, *args, **traced)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self.failed(error)
            return self.layer._call_impl(hidden_states, *args, **kwargs)
        finally:
            CALL.reset(token)


def compile_layers(
    model: PreTrainedModel, check: Callable[[], None], log: Callable[[str], None]
) -> None:
    """Compile each decoder layer; one graph serves all of a class. Where it fails, log why.

    Only the layers are: their graph is small, and the rest of a forward is a few operators.

    Args:
        model: Changed in place.
        check: Raises where it computes something else then.
        log: Told why nothing was compiled, now or at a later step.
    """
    if is_told_beside(model) or is_adapted(model):
        log("the model's layers run uncompiled: how they attend is not all in their own code")
        return
    if compiled_layers(model):
        return
    try:
        with warnings.catch_warnings():
            # Inductor advises TF32 for float32 models, which would change their tokens.
            warnings.simplefilter("ignore")
            _prepare(model, log)
            logits_of(model, _TOKENS)
        with torch.compiler.set_stance("fail_on_recompile"):
            check()
    except Exception as error:  # no compiler, no triton, or a layer that can't be one graph
        _uncompile(model, log, error)
    _end_compilers()


def _prepare(model: PreTrainedModel, log: Callable[[str], None]) -> None:
    """Have each layer compiled at its next call."""
    wait_for_compilers()
    layers, attentions = decoder_layers(model)
    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True, dynamic=True)
        for kind in {type(layer) for layer in layers}
    }
    failed = partial(_uncompile, model, log)
    for i, layer in enumerate(layers):
        layer._compiled_call_impl = _Layer(layer, compiled[type(layer)], i, attentions[i], failed)


_ending: list[Thread] = []  # of torch's compile processes, for whose end ours would wait seconds


def wait_for_compilers() -> None:
    """Wait until those are gone that were told to end: torch would still ask them."""
    while _ending:
        _ending.pop().join()


def _end_compilers() -> None:
    """Let them end beside whatever comes next."""
    from torch._inductor.async_compile import (  # noqa: PLC0415 - slow, and loaded by now
        shutdown_compile_workers,
    )

    _ending.append(Thread(target=shutdown_compile_workers, name="end-compilers", daemon=True))
    _ending[-1].start()


def compiled_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that are compiled, or will be at their next call."""
    return [m for m in model.modules() if isinstance(m._compiled_call_impl, _Layer)]


def _uncompile(model: PreTrainedModel, log: Callable[[str], None], error: Exception) -> None:
    for layer in compiled_layers(model):
        layer._compiled_call_impl = None
    log(f"the model's layers run uncompiled, because compiling them fails: {brief(error)}")


def brief(error: Exception) -> str:
    """An error in a line."""
    error = getattr(error, "inner_exception", error)  # a failed compiler's first line has no reason
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
