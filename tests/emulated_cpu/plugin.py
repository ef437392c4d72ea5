"""Of pytest (`-p`): native code takes this CPU for one with AVX512-BF16 and AMX.

It is compiled by the compiler of `CXX`, which has to bring instructions.h.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from batchrun import machine

# What is compiled is kept by the CPU's features: another header is another CPU.
_HEADER = Path(__file__).with_name("instructions.h").read_bytes()
_FEATURES = (
    "avx512_bf16 avx512bw avx512dq avx512vl amx_bf16 amx_tile "
    + hashlib.sha256(_HEADER).hexdigest()
)
machine.cpu_features = lambda: _FEATURES

from batchrun.engine import cpu  # noqa: E402 - it takes the function from there

cpu._granted = lambda: True
