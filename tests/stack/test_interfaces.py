"""What we call in torch, transformers and the CUDA bindings exists, and takes our arguments."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from batchrun.engine.attention import Geometry, LayerAttention, LayerSpec
from batchrun.engine.attention.torch_flash import TorchFlash
from batchrun.engine.core import Segment
from batchrun.engine.transfers import copied
from tests.test_docs import ROOT

LIBRARIES = ("torch", "transformers", "triton")
FOLDERS = ("allocator", "batchrun", "jobs", "benchmarks/gpu")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__main__.py"  # to import it is to run it
)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_can_be_imported() -> None:
    """In another process, for some set environment variables."""
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    names = [module_of(path) for path in FILES if not missing(path)]
    command = [sys.executable, "-W", "ignore", "-c", code, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def of_libraries(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in LIBRARIES


def resolve(name: str) -> Any:
    """What a dotted name stands for, importing as much of it as is a module."""
    first, *rest = name.split(".")
    found, path = import_module(first), first
    for part in rest:
        path += f".{part}"
        if not hasattr(found, part):
            with suppress(ImportError):
                import_module(path)
        found = getattr(found, part)
    return found


def aliases(tree: ast.AST) -> dict[str, str]:
    """The names that a file gives to modules and members of the libraries."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in filter(lambda alias: of_libraries(alias.name), node.names):
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom) and node.module and of_libraries(node.module):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def missing(path: Path) -> set[str]:
    """The libraries of a file that are not installed."""
    names = aliases(ast.parse(path.read_text(encoding="utf-8"))).values()
    used = {name.split(".", maxsplit=1)[0] for name in names}
    return {name for name in used if find_spec(name) is None}


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """The library's name that an expression spells out; None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in names:
        return ".".join([names[node.id], *reversed(parts)])
    return None


def wrong(function: Any, call: ast.Call) -> str | None:
    """How a call does not fit a signature; None also where a signature can't be had."""
    try:
        # Of a class method that was wrapped, the inner signature would lose two arguments.
        signature = inspect.signature(function, follow_wrapped=not inspect.ismethod(function))
    except (TypeError, ValueError):
        return None
    open_ended = [a for a in call.args if isinstance(a, ast.Starred)]
    if open_ended or any(keyword.arg is None for keyword in call.keywords):
        return None
    try:
        signature.bind(*call.args, **{str(k.arg): k.value for k in call.keywords})
    except TypeError as error:
        return str(error)
    return None


def misuses(tree: ast.AST) -> Iterator[str]:
    names = aliases(tree)
    for name in names.values():
        try:
            resolve(name)
        except (ImportError, AttributeError) as error:
            yield f"{name}: {error}"
    for node in ast.walk(tree):
        spelled = dotted(node.func if isinstance(node, ast.Call) else node, names)
        if spelled is None:
            continue
        try:
            found = resolve(spelled)
        except (ImportError, AttributeError) as error:
            yield f"line {getattr(node, 'lineno', 0)}: {spelled}: {error}"
            continue
        reason = wrong(found, node) if isinstance(node, ast.Call) else None
        if reason:
            yield f"line {getattr(node, 'lineno', 0)}: {spelled}: {reason}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_libraries_have_what_a_file_uses(path: Path) -> None:
    if absent := missing(path):
        pytest.skip(f"{', '.join(absent)} is not installed")
    import_module("batchrun.engine.model.hook")  # defines an operator
    assert list(misuses(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_misuses_are_found() -> None:
    code = "import torch\nfrom torch import nn\ntorch.cuda.graph(1, bull=2)\nnn.Nothing\n"
    code += "torch.ops.aten._no_such_operator\nfrom transformers import Missing\n"
    found = "\n".join(misuses(ast.parse(code)))
    for word in ("bull", "Nothing", "_no_such_operator", "Missing"):
        assert word in found


def driver_calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The driver's functions and their arguments: in calls by name, and in tuples kept for one."""
    for node in ast.walk(tree):
        items = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        name = getattr(items[0], "value", None) if items else None
        if isinstance(name, str) and name.startswith("cu") and name[2:3].isupper():
            yield name, len(items) - 1


def test_the_driver_s_functions_take_as_many_arguments() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    source = (ROOT / "allocator" / "cuda.py").read_text(encoding="utf-8")
    calls = set(driver_calls(ast.parse(source)))
    assert len({name for name, _ in calls}) > 10
    for name, count in calls:
        parameters = inspect.signature(getattr(driver, name)).parameters
        assert len(parameters) == count, f"{name} takes {list(parameters)}"


METHODS = {
    "torch.cuda.Event": "record synchronize query elapsed_time",
    "torch.cuda.Stream": "wait_stream synchronize",
    "torch.cuda.CUDAGraph": "replay capture_begin capture_end",
}


@pytest.mark.parametrize("name", METHODS)
def test_streams_events_and_graphs_have_the_methods_that_are_called(name: str) -> None:
    assert [m for m in METHODS[name].split() if not hasattr(resolve(name), m)] == []


def test_a_device_s_failure_is_told_from_other_errors() -> None:
    assert issubclass(torch.AcceleratorError, RuntimeError)
    assert not issubclass(torch.AcceleratorError, torch.OutOfMemoryError)


POSITIONAL = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
KEYWORDS = {"scale", "window_size_left", "window_size_right", "seqused_k"}


def test_the_flash_operator_has_the_arguments_that_are_passed() -> None:
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    assert [a.name for a in arguments if not a.kwarg_only] == POSITIONAL.split()
    assert {a.name for a in arguments if a.kwarg_only} >= KEYWORDS


@pytest.mark.parametrize("window", [None, 24])
def test_the_flash_operator_takes_a_step_of_decodes_and_prefills(window: int | None) -> None:
    """The real operator's dispatch and shapes, on tensors without memory."""
    spec = LayerSpec(8, 2, 64, 64, 0.125, window)
    meta = torch.device("meta")
    geometry = Geometry((spec,), 320, 4, 4, 256, torch.bfloat16, meta)
    kernel = torch.ops.aten._flash_attention_forward
    backend = TorchFlash(geometry, partial(copied, device=meta), kernel)
    spans = [(299, 1), (7, 1), (20, 40), (0, 30)]
    segments = [Segment(i, *span, sampled=True) for i, span in enumerate(spans)]
    keys = torch.empty(4, 320, 2, 64, dtype=torch.bfloat16, device=meta)
    layer = LayerAttention(spec.scale, window)
    for some in (segments, segments[:2], segments[2:]):
        backend.plan(some)
        tokens = sum(segment.length for segment in some)
        query = torch.empty(tokens, 8, 64, dtype=torch.bfloat16, device=meta)
        assert backend.run(layer, query, (keys, keys)).shape == (tokens, 8, 64)
    backend.plan(segments[:2], fixed=True)
    assert backend.run(layer, query[:2], (keys, keys)).shape == (2, 8, 64)
