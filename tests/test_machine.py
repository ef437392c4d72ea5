"""What the C library does with freed memory."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource
from batchrun import machine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"1" * (32 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

machine.return_freed_memory()
returned = faults()
machine.keep_freed_memory()
faults()
kept, held = faults(), resident()
machine.return_freed_memory()
print(returned, kept, held, resident())
"""


def test_freed_memory_goes_back_or_stays_as_told() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    returned, kept, held, after = map(int, done.stdout.split())
    assert kept * 4 < returned  # pages that the kernel made anew
    assert after < held - (16 << 20) // 4096
