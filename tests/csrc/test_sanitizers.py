"""The C++ kernels built with the address and undefined-behaviour sanitizers, through the tests that judge them.

A read beyond a tensor usually lands in memory that is there, and gives the right result: only a sanitizer sees it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import ROOT, build

CXX = os.environ.get("CXX") or "c++"


def runtime(name: str) -> str | None:
    """The compiler's shared library of that name; a compiler that has none echoes the name."""
    path = subprocess.run([*CXX.split(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) else None


HAS_COMPILER = shutil.which(CXX.split()[0]) is not None
# libstdc++ too: without it the sanitizer starts before there is a __cxa_throw to intercept.
RUNTIMES = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")] if HAS_COMPILER else [None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # the build takes minutes, and sanitized code runs several times slower
    pytest.mark.skipif(None in RUNTIMES, reason=f"{CXX} has no shared sanitizer runtime (GCC's libasan and libubsan)"),
]


@pytest.fixture(scope="module")
def tree() -> Path:
    return build("sanitized", I2V_KERNELS_SANITIZE="1", I2V_KERNELS_BUILD_CUDA="0")


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(RUNTIMES),
        # Python leaks on purpose. Fake stacks stay off: GCC 12 aligns them to 32 bytes, and AVX-512 spills need 64.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, errors="replace")


def test_the_sanitized_extension_is_the_one_loaded(tree):
    done = python(tree, "-c", "import i2v_kernels; print(i2v_kernels._extension.load()[0].__file__)")
    assert done.stdout.strip().startswith(str(tree)), done.stdout + done.stderr


@pytest.mark.parametrize(
    "call",
    (
        "i2v_kernels.token_shift(lying, [2], [1], 'zeros', 0, 3, 1, False, 'cpu')",
        "i2v_kernels_C.token_shift(lying, torch.empty(1, 5, 3, 8), [2], [1], 0, 0, 3, 1, False, False)",
    ),
    ids=("cpu", "emulated"),
)
def test_a_read_beyond_a_tensor_is_caught(tree, call):
    """The proof that the tests below can fail: a tensor that claims more frames than its memory holds."""
    code = (
        "import numpy, torch, i2v_kernels\n"
        "lying = torch.from_numpy(numpy.lib.stride_tricks.as_strided(numpy.ones((1, 4, 3, 8), 'f4'), (1, 5, 3, 8)))\n"
        f"torch.ops.{call}\n"
        "print('went unseen')\n"
    )
    done = python(tree, "-c", code)
    assert done.returncode != 0 and "went unseen" not in done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize(
    "selection",
    (
        ("ops/test_correct.py", "-k", "cpu or bad or rows or threads"),
        ("csrc/test_odd_shapes.py",),
        ("csrc/test_token_shift_emulated.py",),
        ("ops/test_temporal_attention_cuda.py",),
        ("ops/test_temporal_conv_cuda.py",),
    ),
    ids=lambda selection: Path(selection[0]).stem,
)
def test_no_findings(tree, selection):
    file, *options = selection
    # Captured output would be lost with the process; faulthandler would take the signals that the sanitizer reports.
    pytest_options = ("-q", "--capture=no", "-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "no:benchmark")
    place = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
    done = python(tree, "-m", "pytest", *pytest_options, *place, str(ROOT / "tests" / file), *options)
    report = done.stdout + done.stderr
    assert "runtime error" not in report and "AddressSanitizer" not in report, report[-8000:]
    assert done.returncode in (0, 1), report[-8000:]  # 1: a comparison failed, which the plain run of these tests judges
    assert " passed" in done.stdout, report[-8000:]
