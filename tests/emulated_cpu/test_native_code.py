"""Native code for bfloat16 on CPUs that this machine has none of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun import machine
from batchrun.engine import cpu
from batchrun.engine.cpu import compile as compiled
from tests.suites import ROOT, run_tests

HEADER = Path(__file__).with_name("instructions.h")


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """The C++ compiler, for the emulated CPU."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("there is no C++ compiler (g++)")
    if not {"avx2", "fma"} <= set(machine.cpu_features().split()):
        pytest.skip("what is emulated is computed by AVX2 and FMA")
    without = "-mno-avx512f -mno-amx-tile -mno-amx-bf16"
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\nexec {found} "$@" {without} -include {HEADER} -Wno-psabi\n')
    script.chmod(0o755)
    return script


@pytest.mark.skipif(cpu.level() is cpu.Level.TILES, reason="this CPU runs these tests itself")
@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("tests/engine/test_cpu_layers.py", ""),
        ("tests/attention/test_native.py", "segments or same_bits or in_common or keys_and_values"),
        ("tests/engine/test_quantize.py", "native"),
        ("tests/test_determinism.py", "native"),
    ],
)
def test_it_computes_on_an_emulated_cpu_as_on_a_real_one(
    compiler: Path, file: str, names: str
) -> None:
    plugin = "-p", "tests.emulated_cpu.plugin"
    run_tests(ROOT / file, *plugin, "-k", names, CXX=str(compiler))


@pytest.mark.skipif(cpu.level() is not cpu.Level.NOTHING, reason="it computes bfloat16 otherwise")
def test_wide_vectors_give_the_bits_of_narrow_ones(compiler: Path, tmp_path: Path) -> None:
    """16 lanes and 8: a job may go on on another machine."""
    found = set()
    for cxx in (str(compiler), ""):
        cache = tmp_path / f"cache-{bool(cxx)}"
        done = subprocess.run(
            [sys.executable, "-m", "tests.emulated_cpu.bits"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "CXX": cxx, "XDG_CACHE_HOME": str(cache)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list(cache.rglob("layers-*.so"))) == 3  # a dtype each
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("source", ["layers", "attention", "sampling"])
@pytest.mark.parametrize(
    ("compiler", "cpu_flag"),
    [("aarch64-linux-gnu-g++", "-mcpu=neoverse-n1"), ("g++-11", "-march=native")],
)
def test_other_compilers_take_it(compiler: str, cpu_flag: str, source: str) -> None:
    """As far as this machine has them: an ARM compiler, and an old one."""
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    flags = [flag for flag in compiled._FLAGS if not flag.startswith("-m")]
    command = [compiler, *flags, cpu_flag, "-DOF_FLOAT16", "-fsyntax-only"]
    path = Path(compiled.__file__).with_name(f"{source}.cpp")
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
