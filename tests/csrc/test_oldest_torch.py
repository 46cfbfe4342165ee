"""csrc against the headers of the oldest PyTorch that is supported; the ordinary build takes those of the installed one.

Only the headers of that release are kept, of a wheel of half a gigabyte. That the result also runs: ``make test-oldest``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
from building import ROOT

from bench import cache

OLDEST = "2.11.0"
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
SOURCES = [ROOT / "csrc" / "module.cpp", *sorted((ROOT / "csrc").glob("*/*.cpp"))]
CUDA_SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
CXX = os.environ.get("CXX") or "c++"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which(CXX.split()[0]) is None, reason=f"no {CXX}")]


@pytest.fixture(scope="module")
def headers() -> Path:
    """torch/include of that release, from the cache or the package index."""
    kept = cache.folder("headers") / f"torch-{OLDEST}"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        download = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary=:all:", "-d", folder]
        done = subprocess.run([*download, f"torch=={OLDEST}"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            if os.environ.get("CI"):
                pytest.fail(f"torch {OLDEST} could not be had: {done.stderr[-800:]}")
            pytest.skip(f"torch {OLDEST} could not be had from the package index")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder, (name for name in wheel.namelist() if name.startswith("torch/include/")))
        include = Path(folder, "torch", "include")
        if not kept.exists():  # else another run was faster
            include.rename(kept)
    return kept


def compile_once(source: Path, compiler: str, options: list[str], headers: Path) -> str:
    """What the compiler says of it, or nothing where it once had nothing to say of the same."""
    facts = (subprocess.check_output([*compiler.split(), "--version"]), options, sys.version, pybind11.__version__)
    key = hashlib.sha256(repr(facts).encode())
    for path in (source, *sorted(source.parent.glob("*.h")), *sorted((ROOT / "csrc" / "common").glob("*.h"))):
        key.update(path.name.encode() + path.read_bytes())
    name = f"{source.parent.name}-{source.name}-{key.hexdigest()[:16]}"
    if cache.load("headers", name) is not None:
        return ""
    includes = [f"-I{place}" for place in (pybind11.get_include(), headers, sysconfig.get_paths()["include"])]
    command = [*compiler.split(), "-std=c++20", "-w", TARGET, "-DUSE_CUDA", "-DTORCH_EXTENSION_NAME=_C", *options, *includes]
    done = subprocess.run([*command, "-o", os.devnull, str(source)], capture_output=True, text=True)
    if done.returncode == 0:
        cache.store("headers", name, True)
        return ""
    return f"{source.name}: {done.stderr[-4000:]}"


def compile_all(sources: list[Path], compiler: str, options: list[str], headers: Path) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(lambda source: compile_once(source, compiler, options, headers), sources)
        return [text for text in said if text]


def test_cpp_compiles(headers):
    assert compile_all(SOURCES, CXX, ["-fsyntax-only", "-D_GLIBCXX_USE_CXX11_ABI=1"], headers) == []


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_compiles(headers):
    """Host and device code, hardly optimised: what the machine code is like is looked at elsewhere."""
    options = ["--expt-relaxed-constexpr", "-arch=sm_90", "-cuda", "-Xcicc=-O0", "-Xptxas=-O0"]
    assert compile_all(CUDA_SOURCES, str(NVCC), options, headers) == []
