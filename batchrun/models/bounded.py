"""A model that is being built is no larger than its files can fill, whatever its config says.

transformers makes random numbers of what files lack. A config of a hundred times the vocabulary
would have them made before anybody compares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.modules import module as registry

from batchrun.errors import ModelError
from batchrun.models.headers import Stored

# How much more than its files hold a model may be built with: layers share tensors, and what is a
# little off is told by the names of tensors, once it is built.
_TIMES = 4
_MORE_WEIGHTS = 1 << 26
_MORE_BUFFERS = 1 << 30  # bytes
_MODULES = 64  # for each tensor
_MORE_MODULES = 2_000


@contextmanager
def bounded(stored: Collection[Stored], *, quantised: bool) -> Iterator[None]:
    """While modules are built, count them, their parameters and their buffers.

    Args:
        stored: All tensors of the files.
        quantised: Whether a number in them holds several weights.

    Raises:
        ModelError: There are far more than the files can fill.
    """
    nbytes = sum(tensor.nbytes for tensor in stored)
    held = nbytes * 8 if quantised else sum(tensor.elements for tensor in stored)
    most = {
        "modules": _MODULES * len(stored) + _MORE_MODULES,
        "weights": _TIMES * held + _MORE_WEIGHTS,
        "bytes of constants": nbytes + _MORE_BUFFERS,
    }
    counts = dict.fromkeys(most, 0)

    def count(what: str, amount: int) -> None:
        counts[what] += amount
        if counts[what] > most[what]:
            raise ModelError(
                f"the config.json is of another model: it asks for {counts[what]:,} {what} and "
                f"more, and the files have {len(stored):,} tensors of {held:,} weights",
                hint="use the config.json that came with the weights",
            )

    def of_module(_: nn.Module, __: str, module: nn.Module | None) -> None:
        count("modules", 1)

    def of_parameter(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        count("weights", 0 if parameter is None else parameter.numel())

    def of_buffer(_: nn.Module, __: str, buffer: Tensor | None) -> None:
        count("bytes of constants", 0 if buffer is None else buffer.nbytes)

    with ExitStack() as hooks:
        for handle in (
            registry.register_module_module_registration_hook(of_module),
            registry.register_module_parameter_registration_hook(of_parameter),
            registry.register_module_buffer_registration_hook(of_buffer),
        ):
            hooks.callback(handle.remove)
        yield
