"""`batchrun doctor`: what this machine has, and what batchrun can do with it."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from batchrun import DISTRIBUTION
from batchrun.cli import limits
from batchrun.cli.describe import print_fields
from batchrun.cli.inspect import json_option
from batchrun.engine.attention import NAMES
from batchrun.jobs.folder import home
from batchrun.jobs.probe import lacks
from batchrun.machine import cores, memory, multiplies_bfloat16
from batchrun.models.resolve import DEFAULT_MODEL, EMBEDDED_INSTALL, embedded_gguf
from batchrun.report.text import size
from batchrun.terminal import say_json
from batchrun.trust import others_write

# transformers model types whose tokens the tests compare with `generate`. Others are tried by the
# engine's gates when a job starts, and refused if they would be wrong.
TESTED = (
    "codegen",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "llama",
    "llama4_text",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "gguf")
_CUDA_PACKAGES = ("cuda-bindings", "flashinfer-python")  # what a GPU needs, and what it may use
_DRIVER = Path("/proc/driver/nvidia/version")


@click.command()
@json_option
def doctor_command(as_json: bool) -> int:
    """Show what this machine can do: versions, memory, devices, and what stands in the way.

    Each attention kernel is run on a small case and compared with float32, and each kind of
    attention by what `--attention auto` takes for it: a kernel, or SDPA, which is slow.

    Exits with 1 if something would keep a job from running.
    """
    found = examine()
    if as_json:
        say_json(found)
    else:
        print_fields({name.replace("_", " "): _shown(name, value) for name, value in found.items()})
    return 1 if found["problems"] else 0


def examine() -> dict[str, Any]:
    """Looks at the machine, and tries what may be forbidden. Memory in bytes; nothing is left."""
    folder = home()
    problems = []
    if platform.system() != "Linux":
        problems.append(f"batchrun needs Linux (mmap, memfd); this is {platform.system()}")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        problems += lacks(existing)
    except OSError:
        problems.append(f"{existing} cannot be written; set BATCHRUN_HOME to a folder of yours")
    problems += limits.lacking()
    versions = {name: _version(name) for name in _PACKAGES}
    problems += [f"{name} is not installed" for name, found in versions.items() if not found]
    versions |= {name: _version(name) for name in _CUDA_PACKAGES}
    embedded = embedded_gguf()
    attention, of_models = _attention()
    return {
        "batchrun": _version(DISTRIBUTION),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": versions,
        "cpu_cores": cores(),
        "memory": memory(),
        "limits": {**limits.limits(), **limits.fallbacks()},
        "devices": _devices(),
        "attention": attention,
        "attention_of_models": of_models,
        "home": str(folder),
        "home_private": f"no, others can write it: chmod go-w '{folder}'"
        if others_write(folder)
        else "yes",
        "home_free": shutil.disk_usage(existing).free,
        "default_model": f"{DEFAULT_MODEL}, "
        + (
            f"embedded: {embedded}" if embedded else f"from the hub; without it: {EMBEDDED_INSTALL}"
        ),
        "tested_architectures": list(TESTED),
        "problems": problems,
    }


def _shown(name: str, value: Any) -> Any:
    if name == "home_free":
        return size(value)
    if isinstance(value, dict):
        return {
            key: size(item) if isinstance(item, int) else item or "not installed"
            for key, item in value.items()
        }
    if name == "batchrun" and value is None:
        return "not installed: a checkout"
    return ", ".join(value) if name == "tested_architectures" else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch  # noqa: PLC0415  (slow to import)

    names = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        names.append(f"cuda:{index} {properties.name}, {size(free)} free of {size(total)}")
    if _DRIVER.exists():
        names.append(_DRIVER.read_text().splitlines()[0])
    return names


def _attention() -> tuple[dict[str, str], dict[str, str]]:
    """What each kernel library says to a small case on the best device, and what each model gets.

    Returns:
        By library, and by kind of attention.
    """
    import torch  # noqa: PLC0415  (slow to import)

    from batchrun.engine.model.judge import (  # noqa: PLC0415  (needs torch)
        check_kernel,
        check_kinds,
    )

    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.float32
    if cuda or multiplies_bfloat16():
        dtype = torch.bfloat16
    found = {name: check_kernel(name, device, dtype) for name in NAMES}
    return (
        {name: f"{'works' if works else 'no'}: {what}" for name, (works, what) in found.items()},
        {
            kind: f"{'fast' if fast else 'works, slowly'}: {what}"
            for kind, (fast, what) in check_kinds(device, dtype).items()
        },
    )
