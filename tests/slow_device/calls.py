"""Which calls an engine makes to the CUDA driver, and whether the device computes meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from batchrun.engine.build import Assembly
from tests.slow_device.device import SlowDevice

MAPPING = frozenset({"cuMemCreate", "cuMemMap", "cuMemSetAccess"})


class DriverCalls:
    """Calls of an engine over `CudaMemory` and a slow device, from now on.

    One is exposed when no launched step is unfinished: the device has nothing to do and waits for
    the host. One is urgent when the next step can't be launched before it, exposed or not.

    Attributes:
        calls: By name, whether it was exposed, and whether it was urgent.
    """

    def __init__(self, rig: Assembly, device: SlowDevice) -> None:
        self.calls: Counter[tuple[str, bool, bool]] = Counter()
        self._steps, self._urgent = device.steps, False
        driver, scheduler = rig.arena.memory.driver, rig.scheduler  # type: ignore[attr-defined]
        self._call: Callable[..., Any] = driver.call
        self._plan = scheduler.plan
        driver.call, scheduler.plan = self._counted, self._planning

    def count(
        self,
        names: Collection[str] = MAPPING,
        *,
        exposed: bool | None = None,
        urgent: bool | None = None,
    ) -> int:
        """Calls of these functions; only those that are so, where it is said."""
        return sum(
            count
            for (name, *kind), count in self.calls.items()
            if name in names
            and all(
                one in {None, is_so} for one, is_so in zip((exposed, urgent), kind, strict=True)
            )
        )

    def _counted(self, name: str, *args: Any) -> Any:
        self.calls[name, not self._steps.unfinished(), self._urgent] += 1
        return self._call(name, *args)

    def _planning(self) -> Any:
        self._urgent = True
        try:
            return self._plan()
        finally:
            self._urgent = False
