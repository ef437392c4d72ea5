from collections.abc import Callable, Iterator

import memory_twins
import pytest
from memory_twins import PAGE, SCALE, Twin

from batchrun.allocator.arena import KVArena
from batchrun.allocator.layout import KVLayout, LayerKV
from batchrun.allocator.vmm import VirtualMemory


@pytest.fixture(params=[1, 3], ids=["", "planes"])
def twin(request: pytest.FixtureRequest) -> Iterator[Twin]:
    twin = memory_twins.open_twin(planes=request.param)
    yield twin
    twin.memory.close()


@pytest.fixture
def memory() -> Iterator[VirtualMemory]:
    memory = memory_twins.open_memory()
    yield memory
    memory.close()


@pytest.fixture
def make_arena(memory: VirtualMemory) -> Callable[..., KVArena]:
    """Arenas of which a page holds four tokens of one layer: 1 KiB each where pages are 4 KiB."""

    def make(
        *, layers: int = 1, layers_per_slab: int | None = None, max_tokens: int = 64, **options
    ) -> KVArena:
        layout = KVLayout(
            (LayerKV(kv_heads=2, k_dim=64 * SCALE, v_dim=64 * SCALE),) * layers,
            dtype_bytes=4,
            page_size=PAGE,
            max_tokens=max_tokens,
            layers_per_slab=layers_per_slab or layers,
        )
        return KVArena(memory, layout, **{"num_slots": 4, **options})

    return make
