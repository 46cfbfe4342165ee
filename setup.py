"""Builds ``i2v_kernels._C`` with what the machine has: the C++ kernels always, the CUDA kernels where nvcc is found.

I2V_KERNELS_NO_EXTENSION=1   install without compiling: ops run on reference and Triton
I2V_KERNELS_BUILD_CUDA=0|1   leave the CUDA kernels out, or fail where they cannot be built
TORCH_CUDA_ARCH_LIST         as everywhere in PyTorch; "8.0;9.0a;10.0+PTX" if unset
CUDA_HOME, CXX, MAX_JOBS     as everywhere in PyTorch
I2V_KERNELS_FAST_BUILD=1     kernels for CPUs hardly optimised: for machines where those for GPUs are all that counts
I2V_KERNELS_SANITIZE=1       with address and undefined-behaviour sanitizers, for the tests
I2V_KERNELS_VERBOSE=1        with every warning, and registers and spills of each CUDA kernel
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of PyTorch 2.11
WITHOUT = "I2V_KERNELS_NO_EXTENSION=1 installs without compiling: every op then runs on PyTorch or Triton."


def flag(name: str) -> str:
    """An environment variable that is "0", "1" or empty."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r} must be 0, 1 or unset")
    return value


def say(text: str) -> None:
    print(f"i2v-kernels: {text}", file=sys.stderr, flush=True)


def files(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob(f"*.{suffix}"))


def find_cuda() -> str | None:
    """The CUDA toolkit's folder; a wrapper or link named nvcc is followed to the toolkit it belongs to."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and str(Path(nvcc).resolve().parent.parent)]
    for place in places:
        if place and Path(place, "bin", "nvcc").exists() and Path(place, "include", "cuda_runtime.h").exists():
            return str(Path(place).resolve())
    return None


def toolkit() -> tuple[str, str] | None:
    """The CUDA toolkit's folder and its default architectures, or None where the CUDA kernels are left out."""
    import torch

    wanted, home = flag("I2V_KERNELS_BUILD_CUDA"), find_cuda()
    if wanted == "0":
        return None
    version = (0, 0)
    if home:
        found = re.search(r"define CUDA_VERSION (\d+)", Path(home, "include", "cuda.h").read_text())
        version = divmod(int(found[1]) // 10, 100) if found else version
    if home is None:
        problem = "no CUDA toolkit was found; set CUDA_HOME"
    elif torch.version.cuda is None:
        problem = f"the installed torch {torch.__version__} is not a CUDA build"
    elif version[0] != int(torch.version.cuda.split(".")[0]):  # minor versions are compatible with each other
        problem = f"torch was built with CUDA {torch.version.cuda}, but {home} holds {version[0]}.{version[1]}"
    else:
        return home, "8.0;9.0a;10.0+PTX" if version >= (12, 8) else "8.0;9.0a;9.0+PTX"
    if wanted == "1":
        raise SystemExit(f"I2V_KERNELS_BUILD_CUDA=1, but {problem}")
    say(f"the CUDA C++ kernels are left out: {problem}. GPUs are served by Triton.")
    return None


def extension() -> dict:
    if flag("I2V_KERNELS_NO_EXTENSION") == "1":
        return {}
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        say(f"WARNING: no C++ compiler named {compiler!r} was found (set CXX). Installing without compiled kernels.")
        say("Every op still runs: through Triton on GPUs, through plain PyTorch, slower, on CPUs.")
        return {}
    try:
        import pybind11
        import torch  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"compiling i2v-kernels needs {error.name}: install it first. {WITHOUT}") from error
    cuda = toolkit()
    if cuda:
        os.environ["CUDA_HOME"] = cuda[0]
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda[1]
    from torch.utils import cpp_extension

    verbose = flag("I2V_KERNELS_VERBOSE") == "1"
    sources = files("cpp")
    flags = [
        "-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", TARGET,
        "-D_GLIBCXX_USE_CXX11_ABI=1", f"-ffile-prefix-map={HERE}=.",
    ]  # fmt: skip
    if not verbose:
        flags.append("-Wno-maybe-uninitialized")  # GCC 12 says so of its own AVX headers, for pages
    link: list[str] = []
    if flag("I2V_KERNELS_SANITIZE") == "1":
        flags += ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        flags.append("-fno-wrapv")  # Python asks for overflow to wrap, which would hide it
        link += ["-fsanitize=address,undefined"]
    else:
        flags.append("-g0")  # Python asks for debug information, five times the size of the module
        if flag("I2V_KERNELS_FAST_BUILD") == "1":
            flags.append("-O1")
    compile_args: dict[str, list[str]] = {"cxx": flags}
    kind = cpp_extension.CppExtension
    if cuda:
        kind = cpp_extension.CUDAExtension
        sources += files("cu")
        flags += ["-DUSE_CUDA", f'-DI2V_CUDA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"']
        compile_args["nvcc"] = [
            "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", TARGET,
            f"-Xcompiler=-ffile-prefix-map={HERE}=.", "-diag-suppress=177",
        ]  # fmt: skip
        if verbose:
            compile_args["nvcc"].append("-Xptxas=-v")

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                cuda_out = " I2V_KERNELS_BUILD_CUDA=0 leaves only the CUDA kernels out." if cuda else ""
                raise RuntimeError(f"compiling i2v-kernels failed, see above. {WITHOUT}{cuda_out}") from error

    module = kind(
        "i2v_kernels._C",
        sources,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=compile_args,
        extra_link_args=link,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def packages() -> list[str]:
    """Every folder of i2v_kernels, and of models under the name that it is imported by."""
    return [*find_packages(include=["i2v_kernels*"]), "i2v_models", *(f"i2v_models.{name}" for name in find_packages("models"))]


setup(packages=packages(), package_dir={"i2v_models": "models"}, **extension())
