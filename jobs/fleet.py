"""Which options about several devices can be combined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.jobs.errors import OptionError


def check_fleet(given: Mapping[str, Any]) -> None:
    """Refuse options about several devices, by name, that contradict each other.

    Raises:
        OptionError: Two of them do.
    """
    if given["devices"] is not None and given["ray"] is not None:
        raise OptionError("{devices} with {ray}: Ray places the workers")
    for name in ("devices", "ray"):
        if given[name] is not None and given["device"] != "auto":
            raise OptionError(f"{{device}} with {{{name}}}: both say where to compute")
    for name in ("workers", "gpus_per_worker", "cpus_per_worker"):
        if given[name] is not None and given["ray"] is None:
            raise OptionError(f"{{{name}}} needs {{ray}}")
    gpus = given["gpus_per_worker"]
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise OptionError("{gpus_per_worker} {}: give a whole number, or a fraction below 1", gpus)
