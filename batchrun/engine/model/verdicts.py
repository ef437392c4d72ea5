"""The third gate for one model, and the verdicts remembered of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from batchrun import DISTRIBUTION
from batchrun.engine.executor import TorchExecutor
from batchrun.engine.kvspace import KVSpace
from batchrun.engine.model import gates
from batchrun.engine.model.prepare import LoadedModel
from batchrun.models import whole


class Gate:
    """Compares a model as the engine computes it with what it was when this was made.

    Args:
        loaded: The model; its modules are not replaced yet.
        fingerprint: Identifies its weights and config.
        cache: Folder of remembered verdicts.

    Raises:
        ModelError: It has not passed before, and its weights or its own logits are not finite.
    """

    def __init__(self, loaded: LoadedModel, fingerprint: str, cache: Path) -> None:
        self._loaded, self._known = loaded, (fingerprint, cache)
        self._want = None
        if not seen(loaded, fingerprint, cache):
            whole.check_finite(loaded.model)
            self._want = gates.reference(loaded)

    def verify(
        self, executor: TorchExecutor, space: KVSpace, chunk: int, kernels: str
    ) -> float | None:
        """See `gates.verify`; None where the verdict on these kernels was remembered."""
        checked = self._loaded, executor, space, chunk, self._want
        return self.once(kernels, lambda: gates.verify(*checked))

    def once(self, kernels: str, check: Callable[[], float]) -> float | None:
        """See `verify_once`."""
        return verify_once(self._loaded, *self._known, kernels, check)


def seen(loaded: LoadedModel, fingerprint: str, cache: Path) -> bool:
    """Whether the model has passed with any kernels; arguments as for `verify_once`."""
    return any(cache.glob(f"{_key(loaded, fingerprint)}-*"))


def verify_once(
    loaded: LoadedModel, fingerprint: str, cache: Path, kernels: str, check: Callable[[], float]
) -> float | None:
    """Run `check` unless this model passed it before with the same versions, dtype and kernels.

    Args:
        loaded: The model.
        fingerprint: Identifies its weights and config.
        cache: Folder of remembered verdicts.
        kernels: Names the kernels in use.
        check: Calls `verify`.

    Returns:
        What `check` returned, or None where the verdict was remembered.
    """
    path = cache / f"{_key(loaded, fingerprint)}-{kernels.replace('/', '_')}.json"
    if path.exists():
        return None
    worst = check()
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"architecture": loaded.architecture, "difference": worst}))
    return worst


def _key(loaded: LoadedModel, fingerprint: str) -> str:
    versions = [_version(name) for name in (DISTRIBUTION, "torch", "transformers")]
    return "-".join([fingerprint, str(loaded.dtype), str(loaded.device), *versions])


def _version(name: str) -> str:
    try:
        return version(name) or "unknown"  # its metadata can't be read
    except PackageNotFoundError:  # it runs from a checkout
        return "uninstalled"
