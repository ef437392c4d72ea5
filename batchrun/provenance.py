"""Where a job's answers come from: what submitted it, and what each run ran with and on."""

from __future__ import annotations

import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchrun import DISTRIBUTION, cgroups, machine

# Whatever of these is installed has a part in the answers, or in how fast they come.
_PACKAGES = ("torch", "transformers", "tokenizers", "pyarrow", "llguidance", "flashinfer-python")
_NVIDIA = Path("proc/driver/nvidia")
# A URL's scheme, who asks, place, and query. A password may hold any of the signs between them.
_URL = re.compile(r"([a-zA-Z][\w+.-]*)://([^\s/@?#]*:\S*@|[^\s/@?#]*@)?([^\s?#]*)([?#]\S+)?")
_HOOK = re.compile(r"(?s)^(--on-done)=.*")
_NAMES_A_PLACE = {"abfs", "abfss", "gs", "gcs", "hdfs", "s3", "wasb", "wasbs"}  # abfs://disk@store


def command_line(arguments: Sequence[str]) -> str:
    """The command with these arguments, quoted for a shell, without secrets.

    Those are credentials and queries of URLs, and the command of `--on-done`, in which addresses
    of webhooks are secret as a whole.
    """
    shown, hook = ["batchrun"], False
    for argument in map(without_secrets, arguments):
        shown.append("..." if hook else _HOOK.sub(r"\1=...", argument))
        hook = argument == "--on-done" and not hook
    return shlex.join(shown)


def call(inputs: int | Sequence[str], options: Mapping[str, object]) -> str:
    """The call in Python that submits a job, without secrets: see `command_line`.

    Args:
        inputs: Files, or the number of rows if they were in memory.
        options: Of `batchrun.submit`; None means that one was not given.
    """
    shown = f"<{inputs:,} rows>" if isinstance(inputs, int) else ""
    if not isinstance(inputs, int):
        shown = repr(_shown(inputs[0] if len(inputs) == 1 else list(inputs)))
    options = {**options, "on_done": "..." if options.get("on_done") else None}
    given = [f"{name}={_shown(value)!r}" for name, value in options.items() if value is not None]
    return f"batchrun.submit({', '.join([shown, *given])})"


def without_secrets(text: str) -> str:
    """Text whose URLs hold no credentials and no query, which may be a signature."""

    def plain(found: re.Match[str]) -> str:
        scheme, user, place, query = found.groups(default="")
        if user and (":" in user or scheme.lower() not in _NAMES_A_PLACE):
            user = "...@"
        return f"{scheme}://{user}{place}{'?...' if query else ''}"

    return _URL.sub(plain, text)


def setup(root: Path = cgroups.ROOT) -> dict[str, Any]:
    """What this process runs with and on; JSON-able. Loads no torch.

    Returns:
        `versions` by package; `system`, `cpu`, `cores` that may be used, `memory` (bytes), `gpus`
        by name, and the `driver`'s version, or None.
    """
    found = {"batchrun": _version(DISTRIBUTION), "python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    gpus = sorted((root / _NVIDIA / "gpus").glob("*/information"))
    driver = re.search(r"\d+\.\d+(\.\d+)?", cgroups.text_of(root / _NVIDIA / "version"))
    return {
        "versions": {name: known for name, known in found.items() if known},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": machine.description(),
        "cores": machine.cores(),
        "memory": machine.memory()["total"],
        "gpus": [name for path in gpus if (name := _model(cgroups.text_of(path)))],
        "driver": driver and driver[0],
    }


def _model(information: str) -> str:
    """A GPU's name in what its driver says of it."""
    named = (line.partition(":") for line in information.splitlines())
    return next((value.strip() for key, _, value in named if key.strip() == "Model"), "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(value: object) -> object:
    if isinstance(value, str | os.PathLike):
        return without_secrets(os.fspath(value))
    if isinstance(value, Mapping):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_shown, value))
    return value
