"""Every Triton kernel compiled ahead for real GPUs, held against aot_golden.json. ``python test_triton_aot.py --update``.

What is compiled are the launches themselves, on meta tensors of real models' shapes. A compiled kernel must not spill, must
fit in shared memory, must read 16 bytes at a time and, in 16 bits, use matrix instructions; none of it may get worse.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

OPS = ("token_shift", "temporal_conv", "temporal_attention", "bottleneck_adapter", "patch_embed")
GOLDEN = Path(__file__).with_name("aot_golden.json")
TARGETS = {  # name: (backend, architecture, lanes of a warp, bytes of shared memory that a block may have)
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
VECTOR_LOADS = {
    "cuda": r"\bLDG\.E[.\w]*\.128|\bLDGSTS\.E[.\w]*\.128",
    "hip": r"\b(?:global|buffer)_load_dwordx4",
}
MATRIX = {"cuda": r"\b[HQI]?MMA\.|\b[HQ]GMMA\.|\bUTC\w*MMA", "hip": r"\bv_mfma"}
# one 16-bit type on every GPU; the others where the compiler has most choices, once for each maker
DTYPES = {
    torch.bfloat16: tuple(TARGETS),
    torch.float16: ("sm_90",),
    torch.float32: ("sm_90", "gfx942"),
}
REGISTERS = 1.15  # growth that the same compiler may show before it counts


def entries():
    for op in OPS:
        yield from importlib.import_module(f"i2v_kernels.ops.{op}.triton_kernels").AOT


def compile_all(index):
    """``{key: facts}`` of one entry in all its dtypes, for all targets."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry, facts = list(entries())[index], {}
    for dtype in entry.dtypes:
        launch = entry.launch(dtype)
        signature, constants, divisible = launch.specialised()
        names = launch.kernel.arg_names
        source = ASTSource(
            launch.kernel,
            {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
        )
        for name in DTYPES[dtype]:
            backend, arch, lanes, _ = TARGETS[name]
            options = {"num_warps": max(launch.threads // lanes, 1), "num_stages": launch.stages, **launch.options}
            compiled = triton.compile(source, target=GPUTarget(backend, arch, lanes), options=options)
            key = f"{entry.name} | {str(dtype).removeprefix('torch.')} | {name}"
            facts[key] = {
                **(nvidia if backend == "cuda" else amd)(compiled.asm),
                "shared": compiled.metadata.shared,
                "dots": entry.dots and dtype.itemsize == 2,
                "vectors": entry.vectors,
            }
    return facts


def nvidia(asm):
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
    return {"registers": int(registers), "spilled": int(stack), **count(sass, "cuda")}


def amd(asm):
    text = asm["amdgcn"]
    # scalar registers spill to lanes of vector registers, not to memory: they do not count
    spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1))
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
    return {"registers": registers, "spilled": spilled, **count(text, "hip")}


def count(text, backend):
    return {
        "vector loads": len(re.findall(VECTOR_LOADS[backend], text)),
        "matrix instructions": len(re.findall(MATRIX[backend], text)),
    }


def measure():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        facts = {}
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for part in pool.map(compile_all, range(len(list(entries())))):
                facts.update(part)
    return facts


def complaints(key, facts, golden, same_compiler):
    """What is wrong with one compiled kernel, in itself and beside the table."""
    limit = TARGETS[key.split(" | ")[2]][3]
    if facts["spilled"] > 0:
        yield f"spills {facts['spilled']} bytes or registers"
    if facts["shared"] > limit:
        yield f"needs {facts['shared']} bytes of shared memory, but a block has {limit}"
    if facts["vectors"] and facts["vector loads"] == 0:
        yield "reads no 16 bytes at a time"
    if facts["dots"] and facts["matrix instructions"] == 0:
        yield "has no matrix instructions"
    if golden is None:
        yield "is not in the table: --update"
    elif same_compiler:
        if facts["registers"] > REGISTERS * golden["registers"] + 8:
            yield f"takes {facts['registers']} registers, {golden['registers']} before"
        if facts["shared"] > golden["shared"]:
            yield f"takes {facts['shared']} bytes of shared memory, {golden['shared']} before"
        for what in ("vector loads", "matrix instructions"):
            if facts[what] < golden[what] / 2:
                yield f"has {facts[what]} {what}, {golden[what]} before"


@pytest.mark.slow
def test_compiled_ahead():
    """In a process of its own: this one may be interpreting Triton."""
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


def main():
    import triton

    facts = measure()
    if "--update" in sys.argv:
        table = {"triton": triton.__version__, **facts}
        rows = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
        GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    golden = json.loads(GOLDEN.read_text())
    same = golden["triton"] == triton.__version__
    wrong = [f"{key} {text}" for key in facts for text in complaints(key, facts[key], golden.get(key), same)]
    print("\n".join([*wrong, f"{len(facts)} compiled kernels, torch {torch.__version__}, triton {triton.__version__}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
