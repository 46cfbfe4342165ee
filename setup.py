"""Builds ``i2v_kernels._C`` with what the machine has: the C++ kernels always, the CUDA kernels where nvcc is found.

I2V_KERNELS_NO_EXTENSION=1   install without compiling: ops run on reference and Triton
I2V_KERNELS_BUILD_CUDA=0|1   leave the CUDA kernels out, or fail where nvcc is missing
TORCH_CUDA_ARCH_LIST         as everywhere in PyTorch; "8.0;9.0a;10.0+PTX" if unset
I2V_KERNELS_SANITIZE=1       with address and undefined-behaviour sanitizers, for the tests
"""

from __future__ import annotations

import os
import shutil
from glob import glob
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def cuda_home() -> str | None:
    """The CUDA toolkit's folder, or None; a wrapper or link named nvcc is followed to the toolkit it belongs to."""
    wanted = os.environ.get("I2V_KERNELS_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"I2V_KERNELS_BUILD_CUDA={wanted!r} must be 0, 1 or unset")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parent.parent)]
    for place in places:
        if place and Path(place, "bin", "nvcc").exists() and Path(place, "include", "cuda_runtime.h").exists():
            return str(Path(place).resolve())
    if wanted == "1":
        raise SystemExit("I2V_KERNELS_BUILD_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    return None


def extension() -> dict:
    if os.environ.get("I2V_KERNELS_NO_EXTENSION") == "1":
        return {}
    home = cuda_home()
    if home:
        os.environ["CUDA_HOME"] = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    import pybind11
    from torch.utils import cpp_extension

    sources = sorted(os.path.relpath(path, HERE) for path in glob(str(HERE / "csrc" / "**" / "*.cpp"), recursive=True))
    flags = [
        "-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-D_GLIBCXX_USE_CXX11_ABI=1", f"-ffile-prefix-map={HERE}=.",
    ]  # fmt: skip
    link: list[str] = []
    if os.environ.get("I2V_KERNELS_SANITIZE") == "1":
        flags += ["-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
        link += ["-fsanitize=address,undefined"]
    compile_args: dict[str, list[str]] = {"cxx": flags}
    kind = cpp_extension.CppExtension
    if home:
        kind = cpp_extension.CUDAExtension
        sources += sorted(os.path.relpath(path, HERE) for path in glob(str(HERE / "csrc" / "**" / "*.cu"), recursive=True))
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        flags += ["-DUSE_CUDA", f'-DI2V_CUDA_ARCHITECTURES="{architectures}"']
        compile_args["nvcc"] = [
            "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas=-v", "-diag-suppress=177",
        ]  # fmt: skip
    module = kind(
        "i2v_kernels._C",
        sources,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=compile_args,
        extra_link_args=link,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**extension())
