"""What the machine's processor can do."""

from __future__ import annotations

from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux calls them; the last one on Arm


def cpu_features() -> str:
    """The processor's features as Linux lists them, in one line; empty where it lists none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return found.partition(":")[2].strip()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16."""
    return not _BFLOAT16.isdisjoint(cpu_features().split())
