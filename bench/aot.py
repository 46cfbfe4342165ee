"""Every Triton kernel compiled ahead for real GPUs without one, and what its code says.

What is compiled is what the model calls of the registry launch, forward and backward, and what the tables ``AOT`` of
ops/*/triton_kernels.py name besides: other shapes and options, and kernels that cannot read 16 bytes at a time.

Whatever was compiled is kept in ``cache.folder("aot")`` under a hash of all that it depends on: a run in which nothing changed
compiles nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cache, collect, sass
from .sass import Instruction

READER = 1  # of what is kept: to be raised when this file or sass.py reads code differently
BATCH = 16  # kernels that a process compiles before it disassembles them


class Target(NamedTuple):
    """``lanes`` of a warp; bytes of shared memory that a block may have and that a multiprocessor has; warps of the latter."""

    backend: str
    arch: int | str
    lanes: int
    shared: int
    shared_all: int
    warps: int  # of a multiprocessor


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 164 * 1024, 64),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 228 * 1024, 64),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 228 * 1024, 64),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32),
}
# one 16-bit type on every GPU; the others where the compiler has most choices, once for each maker
DTYPES = {"bfloat16": tuple(TARGETS), "float16": ("sm_90",), "float32": ("sm_90", "gfx942")}
USUAL = "sm_90"  # of what is compiled for one GPU
DEVICES = {80: "SM80", 90: "SM90a", 100: "SM100a"}  # as nvdisasm names them


class Job(NamedTuple):
    """One kernel to compile: the launch of entry number ``entry`` in this dtype, for this target."""

    entry: int
    dtype: str
    target: str


@dataclass
class Compiled:
    """A kernel's machine code. ``facts``: what stands in the table of tests/ops/aot_golden.json."""

    facts: dict[str, Any]
    code: list[Instruction]


def _folder() -> Path:
    import i2v_kernels.ops

    return Path(i2v_kernels.ops.__path__[0])


@once
def entries() -> list[tuple[str, Any]]:
    """``(op, entry)``: those of the tables, then one for each further kind of launch that model calls make."""
    found = []
    for path in sorted(_folder().glob("*/triton_kernels.py")):
        op = path.parent.name
        found += [(op, entry) for entry in getattr(importlib.import_module(f"i2v_kernels.ops.{op}.triton_kernels"), "AOT", ())]
    return found + list(_of_models([entry for _, entry in found]))


def _of_models(listed: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """A kernel that no table names is compiled as all are, other launches in one dtype for one GPU."""
    from i2v_kernels.ops.base import OPS
    from i2v_kernels.ops.triton_common import Entry
    from i2v_kernels.testing import OPINFOS

    known = {kind(entry.launch(dtype)) for entry in listed for dtype in entry.dtypes}
    vectors: dict[Any, bool] = {}  # kernel -> whether all that is known of it reads 16 bytes at a time
    for entry in listed:
        kernel = entry.launch(entry.dtypes[0]).kernel
        vectors[kernel] = entry.vectors and vectors.get(kernel, True)
    for info in OPINFOS:
        if "triton" not in OPS[info.name]._by_name:
            continue
        for number, call in enumerate(info.models(1)):
            for place, launch in launches(info, number, torch.bfloat16).items():
                if (which := kind(launch)) in known:
                    continue
                known.add(which)
                new, name = launch.kernel not in vectors, f"{launch.kernel.__name__}, {call.name}, {place}"
                kinds = (torch.bfloat16, torch.float16, torch.float32) if new else (torch.bfloat16,)
                dots, reads = "tl.dot(" in launch.kernel.src, vectors.setdefault(launch.kernel, True)
                yield info.name, Entry(name, partial(_launch, info, number, place), kinds, dots, reads, everywhere=new)


def launches(info: Any, number: int, dtype: torch.dtype) -> dict[str, Any]:
    """Place, such as "backward 1" -> what the op's model call of that number launches there."""
    passes = collect.passes(info, collect.on_meta(info, number, dtype))
    return {f"{which} {i}": launch for which, work in passes.items() for i, launch in enumerate(work.launches)}


def _launch(info: Any, number: int, place: str, dtype: torch.dtype) -> Any:
    return launches(info, number, dtype)[place]


def kind(launch: Any) -> str:
    """Launches of one kind are compiled alike."""
    return digest(source_of(launch).hash(), launch.threads, launch.stages, sorted(launch.options.items()))


def unlisted() -> list[str]:
    """Kernels of ops/*/triton_*.py, functions ``*_kernel`` under ``triton.jit``, that no entry launches."""
    launched = set()
    for _, entry in entries():
        for dtype in entry.dtypes:
            function = entry.launch(dtype).kernel.fn
            launched.add((function.__module__, function.__name__))
    found = []
    for path in sorted(_folder().glob("*/triton_*.py")):
        module = f"i2v_kernels.ops.{path.parent.name}.{path.stem}"
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            if node.name.endswith("_kernel") and (module, node.name) not in launched:
                found.append(f"{path.parent.name}/{path.name}: {node.name}")
    return found


def dtypes(entry: Any) -> list[str]:
    return [name for dtype in entry.dtypes if (name := str(dtype).removeprefix("torch.")) in DTYPES]


def jobs(ops: Sequence[str] = (), targets: Sequence[str] = ()) -> list[Job]:
    """Those of these ops and targets; without any, of all."""
    return [
        Job(i, dtype, target)
        for i, (op, entry) in enumerate(entries())
        for dtype in dtypes(entry)
        for target in (DTYPES[dtype] if entry.everywhere else (USUAL,))
        if (not ops or op in ops) and (not targets or target in targets)
    ]


def name(job: Job) -> str:
    return f"{entries()[job.entry][1].name} | {job.dtype} | {job.target}"


def launch_of(job: Job) -> Any:
    return entries()[job.entry][1].launch(getattr(torch, job.dtype))


def source_of(launch: Any) -> Any:
    from triton.compiler import ASTSource

    signature, constants, divisible = launch.specialised()
    names = launch.kernel.arg_names
    return ASTSource(
        launch.kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )


@once
def _compiler(target: str) -> tuple[Any, str]:
    """Triton's target, and all of the compiler that its output depends on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    spec = TARGETS[target]
    gpu = GPUTarget(spec.backend, spec.arch, spec.lanes)
    return gpu, f"{triton.__version__} {make_backend(gpu).hash()} reader {READER}"


def options_of(launch: Any, target: str) -> dict[str, Any]:
    return {"num_warps": max(launch.threads // TARGETS[target].lanes, 1), "num_stages": launch.stages, **launch.options}


def key_of(launch: Any, target: str) -> str:
    options = sorted(options_of(launch, target).items())
    return digest(source_of(launch).hash(), options, target, _compiler(target)[1])


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def compiled(launches: Sequence[tuple[Any, str]]) -> list[Compiled]:
    """Compile launches for targets, and read their code."""
    import triton

    assembled = []
    for launch, target in launches:
        made = triton.compile(source_of(launch), target=_compiler(target)[0], options=options_of(launch, target))
        assembled.append((made.asm, made.metadata.shared))
    codes: dict[int, list[Instruction]] = {}
    for target in {target for _, target in launches}:
        places = [i for i, (_, other) in enumerate(launches) if other == target]
        if TARGETS[target].backend == "hip":
            codes |= {i: sass.parse_gcn(assembled[i][0]["amdgcn"]) for i in places}
        else:
            found = sass.disassemble([assembled[i][0]["cubin"] for i in places], DEVICES[TARGETS[target].arch])
            codes |= dict(zip(places, found))
    results = []
    for i, ((launch, target), (asm, shared)) in enumerate(zip(launches, assembled)):
        registers, spilled = sass.registers_and_stack(asm["cubin"]) if "cubin" in asm else _of_amd(asm["amdgcn"])
        facts = {"registers": registers, "spilled": spilled, "shared": shared, **sass.facts(codes[i])}
        facts["resident"] = resident(facts, launch.threads, target)
        results.append(Compiled(facts, codes[i][: sass.ends(codes[i])]))
    return results


def _of_amd(text: str) -> tuple[int, int]:
    # scalar registers spill to lanes of vector registers, not to memory: they do not count
    spilled = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
    return int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)), spilled  # type: ignore[union-attr]


def resident(facts: dict[str, Any], threads: int, target: str) -> int:
    """Programs that a multiprocessor holds at a time."""
    spec = TARGETS[target]
    warps = max(threads // spec.lanes, 1)
    if spec.backend == "cuda":  # 16,384 registers for each of four schedulers, in units of 256; a KB of shared memory a program
        rows = -(-max(facts["registers"], 1) * 32 // 256) * 256
        by_registers, reserved, most = 4 * (16384 // rows) // warps, 1024, 32
    else:  # 512 of each lane for each of four SIMDs, in units of 8
        by_registers, reserved, most = 4 * min(512 // (-(-max(facts["registers"], 1) // 8) * 8), 8) // warps, 0, 32
    by_shared = spec.shared_all // max(facts["shared"] + reserved, 1)
    return max(min(by_registers, by_shared, spec.warps // warps, most), 0)


def make(batch: Sequence[Job]) -> None:
    """Compile these and keep them."""
    launches = [(launch_of(job), job.target) for job in batch]
    for (launch, target), result in zip(launches, compiled(launches)):
        keep(key_of(launch, target), result)


def keep(key: str, result: Compiled) -> None:
    """Facts and code apart: who compares tables needs no code."""
    cache.store("aot", f"{key}.code", result.code)
    cache.store("aot", key, result.facts)


def kept(key: str, with_code: bool) -> Compiled | None:
    facts, code = cache.load("aot", key), cache.load("aot", f"{key}.code") if with_code else []
    if facts is None or code is None:
        return None
    return Compiled(facts, [Instruction(*fields) for fields in code])


def read(wanted: Sequence[Job], with_code: bool = True, processes: int = 2) -> Iterator[tuple[Job, Any, Compiled]]:
    """``(job, its launch, what was compiled)`` of all, compiled where it is not kept."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    launches = {job: launch_of(job) for job in wanted}
    keys = {job: key_of(launch, job.target) for job, launch in launches.items()}
    found = {job: kept(key, with_code) for job, key in keys.items()}
    missing = [job for job in wanted if found[job] is None]
    batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
    if batches:
        with (
            tempfile.TemporaryDirectory() as scratch,
            ProcessPoolExecutor(processes, get_context("spawn"), prepare, (scratch,)) as pool,
        ):
            for _ in pool.map(make, batches):
                pass
        cache.prune("aot")
    for job in wanted:
        result = found.pop(job) or kept(keys[job], with_code)
        if result is None:
            raise RuntimeError(f"{name(job)} was compiled, but is not in {cache.folder('aot')}")
        yield job, launches[job], result


def prepare(scratch: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = scratch  # Triton's own cache would keep every stage of every kernel
