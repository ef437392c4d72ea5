"""Compiles the FlashInfer kernels that batchrun uses, on a machine that needs no GPU.

FlashInfer compiles at first use, for minutes. To spend no time of a borrowed GPU on that:

    pip install --no-deps --target wheels flashinfer-python==0.7.2.post1 apache-tvm-ffi nvidia-ml-py
    PYTHONPATH=wheels python -m benchmarks.gpu.prebuild_flashinfer --out kernels

and on the machine with the GPU, where `wheels` and `kernels` were carried to:

    PYTHONPATH=wheels python -m benchmarks.gpu.prebuild_flashinfer --use kernels

which links the folder to where FlashInfer looks for ready kernels; nothing is compiled then, and
neither nvcc nor ninja is needed there. The library that is compiled for must be the one that runs,
and apache-tvm-ffi's wheel one for the Python there. The kernels use neither Python nor torch's
C++, so these may differ; CUDA must be of the same major version.

Where `wheels` is too large to carry: of `flashinfer/data`, which is most of it, ready kernels need
only `csrc/*.jinja` and `csrc/batch_prefill*`, and of `tvm_ffi` no `include`, `src` and `3rdparty`.
The rest is 12 MiB as .tar.xz; a kernel is 2 MiB.

To compile takes torch, nvcc 12.8 or later, ninja, g++, and the CUDA headers. Where the toolkit
lacks cuRAND's (fa3 includes them), `pip install --no-deps --target curand nvidia-curand` and
`CPATH=curand/nvidia/cu13/include` supply them. A module of one head width and dtype took two
minutes (fa2) and fifteen to twenty (fa3) on two busy cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOLKITS = (
    "/usr/local/cuda",
    "/usr/local/cuda-13.0",
    "/usr/local/cuda-12.9",
    "/usr/local/cuda-12.8",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path, help="compile into this folder")
    to.add_argument("--use", type=Path, help="let FlashInfer find the kernels of this folder")
    parser.add_argument("--arch", default="9.0a", help="compute capability of the GPU")
    parser.add_argument("--kinds", nargs="+", default=["fa2", "fa3"], choices=["fa2", "fa3"])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128], help="head widths")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--window", action="store_true", help="also kernels for sliding windows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    # Read when flashinfer is imported: there may be no device to ask.
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = options.arch
    os.environ["MAX_JOBS"] = str(options.jobs)
    if options.use:
        use(options.use.resolve())
    else:
        build(options)
    return 0


def build(options: argparse.Namespace) -> None:
    with work_folder() as folder:
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(folder)
        for spec in specs(options):
            begin = time.monotonic()
            spec.build()
            target = options.out / spec.name / f"{spec.name}.so"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(spec.jit_library_path, target)
            seconds, size = time.monotonic() - begin, target.stat().st_size
            print(f"{seconds:5.0f} s  {size / 2**20:5.1f} MiB  {target}", flush=True)


def specs(options: argparse.Namespace) -> Iterator[Any]:
    """The modules that the engine would ask for."""
    import torch  # noqa: PLC0415 - after the environment is set

    from batchrun.engine.attention.flashinfer import KernelKind, compiled_from  # noqa: PLC0415

    for kind in options.kinds:
        for dtype in options.dtypes:
            for dim in options.dims:
                for window in (False, True)[: 1 + options.window]:
                    yield compiled_from(getattr(torch, dtype), KernelKind(kind, dim, window, False))


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for sources and objects, and an environment in which they link without a driver."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The driver's library is only there with a driver: an empty one of its name will do.
        command = ["cc", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(folder / "libcuda.so")], check=True)
        toolkit = os.environ.get("CUDA_HOME") or next(filter(os.path.isdir, TOOLKITS), "")
        paths = [f"{toolkit}/lib64", str(folder), os.environ.get("LIBRARY_PATH", "")]
        os.environ["LIBRARY_PATH"] = ":".join(filter(None, paths))
        yield folder


def use(kernels: Path) -> None:
    from flashinfer.jit import env  # noqa: PLC0415 - after the environment is set

    folder = Path(env.FLASHINFER_AOT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in sorted(kernels.glob("*/*.so")):
        link = folder / kernel.parent.name
        if link.is_symlink():
            link.unlink()  # It may lead to an older folder, or nowhere.
        if not link.exists():
            link.symlink_to(kernel.parent)
        print(link)


if __name__ == "__main__":
    sys.exit(main())
