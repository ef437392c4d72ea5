"""Compiles a model's decoder layers for an H100, on a machine without one.

    python -m tests.stack.sm90 NAME [--int8]

The model is real and computes on the CPU. What torch.compile hands to inductor is handed on with
every tensor on `cuda:0`, as fake ones; inductor asks a made-up device for its properties, writes
the kernels, and Triton and its ptxas make sm_90 code of them. Nothing is loaded or run. Prints a
JSON object a kernel, then one of the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, where it is patched

import torch
import triton
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import _load_triton_kernel_from_source
from torch._inductor.compile_fx import compile_fx
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget

from batchrun.engine.model import int8
from batchrun.engine.model import optimize as optimizing
from batchrun.engine.model.int8 import Int8Linear, int8_weights
from batchrun.engine.model.layers import logits_of
from batchrun.engine.model.prepare import prepare
from benchmarks.gpu import shapes
from tests.parity import models

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 that is not there",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    total_memory=80 << 30,
)

WITHOUT_A_DEVICE = {
    "joint_graph_constant_folding": False,  # would compute on the device
    "shape_padding": False,  # would measure on the device whether that pays
    "use_static_triton_launcher": False,  # drops a kernel's code
}


def properties(device: Any = None) -> SimpleNamespace:
    return PROPERTIES


def yes(*_: Any, **__: Any) -> bool:
    return True


class H100(device_interface.CudaInterface):
    """What inductor asks a device's interface for."""

    class Worker(device_interface.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(properties)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_properties = staticmethod(properties)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_available = staticmethod(yes)
    is_bf16_supported = staticmethod(yes)
    is_triton_capable = staticmethod(yes)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


def compile_kernel(_: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
    """In the place of `AsyncCompile.triton`: compile as its workers do, and load nothing."""
    kernel = _load_triton_kernel_from_source(name, source)
    kernel.precompile(warm_cache_only=True)
    for result in kernel.compile_results:
        made = result.kernel
        assert made.asm["cubin"].startswith(b"\x7fELF")
        assert ".target sm_90" in made.asm["ptx"]
        size = len(made.asm["cubin"])
        print(json.dumps({"kernel": name, "cubin": size, "warps": made.metadata.num_warps}))
    return kernel


def compile_on_cuda(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: compiles the graph for `cuda:0`, and runs it where it is."""
    values = [n.meta["example_value"] for n in graph.graph.nodes if n.op == "placeholder"]
    mode = detect_fake_mode(values)

    def moved(value: Any, given: Any) -> Any:
        # A number with no dimension is a float of a module, and stays on the host.
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return given if isinstance(given, torch.Tensor) else value
        with mode:
            return torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device="cuda:0"
            )

    there = torch.fx.GraphModule(graph, graph.graph.__deepcopy__({}))
    for node in there.graph.nodes:
        if node.kwargs.get("device") == torch.device("cpu"):
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    there.recompile()
    compile_fx(there, list(map(moved, values, inputs)))
    forward: Callable[..., Any] = graph.forward
    return forward


def by_operator(layer: Int8Linear, x: torch.Tensor) -> Any:
    """`Int8Linear.forward` as it is on a GPU."""
    return torch.ops.batchrun.int8_linear(x, layer.weight, layer.scales, layer.bias)


def build(name: str) -> Any:
    """One layer of a benchmark's model in its real shape, or a tiny model of the parity tests."""
    if name in shapes.SHAPES:
        return shapes.build(replace(shapes.SHAPES[name], layers=1, vocab=512), "cpu")
    return models.build(name).to(torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("--int8", action="store_true")
    args = parser.parse_args()
    device_interface.init_device_reg()  # would be done later, over what follows
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, H100)
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    triton.runtime.driver.set_active(target)
    model = build(args.name)
    library = torch.library.Library("batchrun", "FRAGMENT")
    library.impl("int8_linear", int8.widened, "CPU")
    if args.int8:
        int8_weights(model)
    log: list[str] = []
    with ExitStack() as patches:
        for where, what, by in (
            (AsyncCompile, "triton", compile_kernel),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (torch.cuda, "get_device_properties", properties),
            (torch.cuda, "current_device", lambda: 0),
            (torch, "compile", partial(torch.compile, backend=compile_on_cuda)),
            (optimizing, "_can_be_native", lambda *_: False),
            (Int8Linear, "forward", by_operator),
        ):
            patches.enter_context(mock.patch.object(where, what, by))
        patches.enter_context(torch._inductor.config.patch(WITHOUT_A_DEVICE))
        done = optimizing.optimize(prepare(model).model, compile=True, log=log.append)
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in (2, 1024):  # one graph serves every step
                logits_of(model, tokens)
    print(json.dumps({"optimised": done, "log": log}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
