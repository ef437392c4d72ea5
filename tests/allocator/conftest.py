from collections.abc import Callable, Iterator

import memory_twins
import pytest

from allocator.arena import KVArena
from allocator.host import HostMemory
from allocator.layout import KVLayout, LayerKV


@pytest.fixture(params=memory_twins.TWINS)
def twin(request: pytest.FixtureRequest) -> Iterator[memory_twins.Twin]:
    twin = memory_twins.TWINS[request.param]()
    yield twin
    twin.memory.close()


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    memory = HostMemory(4096)
    yield memory
    memory.close()


@pytest.fixture
def make_arena(memory: HostMemory) -> Callable[..., KVArena]:
    """Arenas whose tokens have 1 KiB per layer: four tokens of one layer to a page."""

    def make(
        *, layers: int = 1, layers_per_slab: int | None = None, max_tokens: int = 64, **options
    ) -> KVArena:
        layout = KVLayout(
            (LayerKV(kv_heads=2, k_dim=64, v_dim=64),) * layers,
            dtype_bytes=4,
            page_size=4096,
            max_tokens=max_tokens,
            layers_per_slab=layers_per_slab or layers,
        )
        return KVArena(memory, layout, **{"num_slots": 4, **options})

    return make
