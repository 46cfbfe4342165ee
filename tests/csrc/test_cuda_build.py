"""The CUDA build, without a GPU: code for each architecture, wide loads and stores, no spills, a clean import."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import build
from torch.utils.cpp_extension import CUDA_HOME

from i2v_kernels import _extension

ARCHITECTURES = ("sm_80", "sm_90a")
NVCC = CUDA_HOME is not None and Path(CUDA_HOME, "bin", "nvcc").exists()
pytestmark = pytest.mark.skipif(
    not NVCC or torch.version.cuda is None, reason="needs nvcc and a CUDA build of torch to compile CUDA C++"
)


def tool(name: str) -> str:
    """A program of the CUDA toolkit; Triton brings the ones it needs itself."""
    triton = importlib.util.find_spec("triton")
    folders = [
        Path(CUDA_HOME, "bin"),
        *(Path(p, "backends", "nvidia", "bin") for p in triton.submodule_search_locations),
    ]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
    assert found, f"{name} is neither in {' nor in '.join(map(str, folders))} nor on PATH"
    return found


def cuobjdump(*arguments: str) -> str:
    beside = os.pathsep.join((str(Path(tool("nvdisasm")).parent), os.environ["PATH"]))  # it calls nvdisasm
    command = [tool("cuobjdump"), *arguments]
    done = subprocess.run(command, env={**os.environ, "PATH": beside}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> str:
    """The installed extension if it has the architectures, else one built for the purpose."""
    module, _ = _extension.load()
    if module and {"8.0", "9.0a"} <= set(module.build_info()["cuda_architectures"].split(";")):
        return module.__file__
    tree = build("cuda", I2V_KERNELS_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    return str(next(tree.glob("i2v_kernels/_C*.so")))


@pytest.fixture(scope="module")
def sass(library) -> dict[tuple[str, str], list[str]]:
    """(architecture, mangled kernel name) -> its instructions, in order."""
    kernels: dict[tuple[str, str], list[str]] = {}
    for arch in ARCHITECTURES:
        current: list[str] = []
        for line in cuobjdump("-sass", "-arch", arch, library).splitlines():
            if name := re.search(r"Function : (\S+)", line):
                current = kernels.setdefault((arch, name[1]), [])
            elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", line):
                current.append(instruction[1])
    return kernels


def kernels_named(sass, *parts: str) -> list[list[str]]:
    found = [code for (_, name), code in sass.items() if all(part in name for part in parts)]
    assert len(found) == len(ARCHITECTURES), f"{parts}: {len(found)} kernels"
    return found


def test_machine_code_for_every_architecture(library):
    listed = cuobjdump("--list-elf", library)
    without_letter = "cuda_12." in cuobjdump("--version")  # that tool calls sm_90a sm_90
    assert all(f".{arch.rstrip('a') if without_letter else arch}.cubin" in listed for arch in ARCHITECTURES), listed


def test_copies_move_sixteen_bytes_with_four_loads_in_flight(sass):
    for code in kernels_named(sass, "token_shift_kernel", "CopyIjLi16E"):
        accesses = [op for op in code if op.startswith(("LDG", "STG"))]
        assert len(accesses) == 8, accesses
        assert all(op.startswith("LDG.E.128") for op in accesses[:4]), accesses
        assert all(op.startswith("STG.E.128") for op in accesses[4:]), accesses


@pytest.mark.parametrize("residual", (0, 1))
@pytest.mark.parametrize("mangled", ("AddIdLi16E", "AddIfLi16E", "BFloat16ELi16E", "HalfELi16E"))
def test_sums_move_sixteen_bytes(sass, mangled, residual):
    for code in kernels_named(sass, "token_shift_kernel", f"{mangled}Lb{residual}E"):
        accesses = [op for op in code if op.startswith(("LDG", "STG"))]
        assert accesses and all(op.startswith(("LDG.E.128", "STG.E.128")) for op in accesses), accesses


@pytest.mark.parametrize("frames", (8, 16, 32))
@pytest.mark.parametrize("mangled", ("BFloat16", "Half"))
def test_attention_moves_sixteen_bytes_and_multiplies_by_matrix_instructions(sass, mangled, frames):
    """All of q, k and v, up to 64 channels (32 of more than 16 frames), are under way before the first product."""
    for code in kernels_named(sass, "attention_forward_kernel", f"{mangled}ELi{frames}E"):
        first = next(i for i, op in enumerate(code) if op.startswith("HMMA"))
        assert sum(op.startswith("LDG.E.128") for op in code[:first]) >= 12, code[:first]
        assert_lean(code)
    for bias in (0, 1):
        for code in kernels_named(sass, "attention_backward_kernel", f"{mangled}ELi{frames}ELb{bias}E"):
            assert_lean(code)


def assert_lean(code):
    """Tensors go by 16 bytes; single numbers are those of bias, mask and log-sum-exp. No shared memory, no barrier."""
    assert {"MOVM.16.MT88"} <= set(code) and not [op for op in code if op.startswith(("LDS", "STS", "BAR", "ATOM", "RED."))]
    wide = [op for op in code if op.startswith(("LDG.E.128", "STG.E.128"))]
    narrow = {op for op in code if op.startswith(("LDG", "STG"))} - set(wide)
    assert len(wide) >= 16 and narrow <= {"LDG.E", "LDG.E.U8", "STG.E"}, narrow


@pytest.mark.parametrize("kernel", ("8Convolve", "17ConvolveAndFinish", "8Products"))
@pytest.mark.parametrize("mangled", ("BFloat16ELi16E", "HalfELi16E", "IfLi16E"))
def test_convolution_moves_sixteen_bytes(sass, mangled, kernel):
    """Three taps in time: their weights, and a thread's frames with their neighbours, are loads of their own."""
    for code in kernels_named(sass, "temporal_conv_kernel", f"{kernel}I", f"{mangled}Li3E"):
        accesses = [op for op in code if op.startswith(("LDG", "STG"))]
        assert all(op.startswith(("LDG.E.128", "STG.E.128")) for op in accesses), accesses
        assert not [op for op in code if op.startswith(("LDS", "STS", "BAR", "ATOM", "RED."))]
        assert sum(op.startswith("LDG") for op in accesses) >= 9, accesses


def test_nothing_spills(library, sass):
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage", library))
    assert len(usage) >= len(sass) > 0
    assert [row for row in usage if row[2:] != ("0", "0")] == []
    local = {key: ops for key, code in sass.items() if (ops := [op for op in code if op.startswith(("LDL", "STL"))])}
    assert not local


def test_imports_without_a_driver(library):
    code = (
        "import i2v_kernels, torch\n"
        "module, reason = i2v_kernels._extension.load()\n"
        "assert reason is None, reason\n"
        "print(module.build_info()['cuda_architectures'])\n"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key('i2v_kernels_C::token_shift', 'CUDA')\n"
        "assert i2v_kernels._extension.why_no_cuda() is None\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(library).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "8.0" in done.stdout and "9.0a" in done.stdout
