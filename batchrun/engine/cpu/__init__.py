"""Native code for CPUs, compiled on the machine that runs it; without it the engine is slower."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache

from batchrun.machine import cpu_features


class Level(IntEnum):
    """The instructions that multiply bfloat16; numbered as in common.h."""

    NOTHING = 0
    VECTORS = 1  # AVX512-BF16
    TILES = 2  # AMX


@cache
def level() -> Level:
    """The best level this process may use."""
    features = set(cpu_features().split())
    if not {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"} <= features:
        return Level.NOTHING
    return Level.TILES if {"amx_bf16", "amx_tile"} <= features and _granted() else Level.VECTORS


def _granted() -> bool:
    """Whether the kernel lets this process use tiles, which it has to be asked for."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
