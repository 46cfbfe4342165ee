"""``python -m bench.machine_code --predict``: bench/predictions.json, what to expect of whole calls on an H100.

The file is ``{"about": ..., "rows": [...]}``. A row has the keys

- ``op``, ``sample``: names in the registry; the sample is one of ``info.models(64)``,
- ``dtype``: "bfloat16",
- ``pass``: "forward", "backward" or "forward+backward",
- ``backend``: "triton", "cuda", or "library" where the op composes PyTorch's kernels and those of other ops,
- ``share``: the floor of the pass over the predicted time; null where a kernel's loops are not counted (bench/rounds.py), and
  ``missing`` then names these. The floor is the longer of the bytes that must move at least, at 3.0 TB/s (forward: the
  registry's ``traffic``; backward: what the backward op is given and gives back), and the operations at the rate of a large
  library product,
- ``microseconds``, ``floor_us``, ``launches``: of the pass; the host's share is not in them,
- ``source``: where it comes from; all of it uncalibrated.

A call's time is the sum over its launches, which are collected by running the op's own launchers on meta tensors. Triton's are
timed by bench/sm.py, PyTorch's by the bytes that they touch and the operations of products.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import aot, machine_code, sm

CLIPS = 64
DTYPE = torch.bfloat16
COPY = sm.MEMORY * sm.CLOCK * sm.MULTIPROCESSORS  # bytes per second
PRODUCT = 700e12  # operations per second of a large library product in 16 bits
GAP = 1.5e-6  # seconds from one kernel of a stream to the next
# of the kernels in C++, from their machine code (nvcc 13, sm_90a): (op, part of the sample's name, pass) -> share
COMPILED_BY_NVCC = {
    ("temporal_attention", "T=8", "forward"): 0.93,
    ("temporal_attention", "T=16", "forward"): 0.92,
    ("temporal_attention", "T=32", "forward"): 0.74,
    ("temporal_attention", "T=8", "backward"): 0.93,
    ("temporal_attention", "T=16", "backward"): 0.90,
    ("temporal_attention", "T=32", "backward"): 0.70,
    ("temporal_conv", "(3,1,1)", "forward"): 0.73,
}


class OnMeta(TorchFunctionMode):
    """Random tensors are made without memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.randint):
            shape = kwargs.get("size") or next((a for a in args if isinstance(a, (tuple, list))), args)
            return torch.empty(tuple(shape), dtype=kwargs.get("dtype"), device="meta")
        return func(*args, **kwargs)


@dataclass
class Work:
    """What a pass launches: Triton's kernels, and PyTorch's by the bytes that they touch and the operations of products."""

    launches: list[Any] = field(default_factory=list)
    others: list[tuple[int, int]] = field(default_factory=list)
    bytes: int = 0  # of what the op was given and gives back


class Collect(TorchDispatchMode):
    """This package's ops run their launchers, which launch nothing; of all else bytes and operations are noted."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.depth = work, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "i2v_kernels":
            with self:
                self.depth += 1
                out = self._ours(func.__name__.split(".")[0], args)
                self.depth -= 1
            if self.depth == 0:
                self.work.bytes += _touched((args, out))
            return out
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.is_view or "empty" in name or name in ("_unsafe_view", "detach", "set_") or not written:
            return out
        flops = 0
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            flops = 2 * written[0].numel() * args[name.startswith(("add", "badd"))].shape[-1]
        self.work.others.append((_touched((args, kwargs, out)), flops))
        return out

    def _ours(self, name: str, args: Sequence[Any]) -> Any:
        from i2v_kernels.ops import base

        backward = name.endswith("_backward")
        op = base.OPS[name.removesuffix("_backward")]
        backend = op._by_name[backend_of(op)]
        return (backend.backward if backward else backend.forward)(*args[:-1])


def _touched(values: Any) -> int:
    """Bytes of the tensors among them, each once."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    places = {(x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()): x for x in tensors}
    return sum(map(machine_code.distinct, places.values()))


def backend_of(op: Any) -> str:
    return "triton" if "triton" in op._by_name else "library"


def collected(call: Callable[[], Any]) -> tuple[Work, Any]:
    """What a call on meta tensors launches, and its result."""
    from i2v_kernels.ops import triton_common

    work = Work()
    real = triton_common.Launch.run
    triton_common.Launch.run = lambda launch: work.launches.append(launch)  # type: ignore[method-assign]
    try:
        with Collect(work):
            return work, call()
    finally:
        triton_common.Launch.run = real  # type: ignore[method-assign]


def passes(info: Any, sample: Any) -> dict[str, tuple[Work, float]]:
    """Pass -> (what it launches, seconds that it takes at least)."""
    forward, out = collected(lambda: info.op(*sample.args, **sample.kwargs))
    out = out if isinstance(out, Tensor) else out[0]
    tensors = [x for x in sample.tensors() if x.requires_grad]
    grad = torch.empty_like(out)
    backward, _ = collected(lambda: torch.autograd.grad(out, tensors, grad))
    floors = [
        max(info.traffic(sample) / COPY, info.flops(sample) / PRODUCT),
        max(backward.bytes / COPY, (2 if sample.args[0].requires_grad else 1) * info.flops(sample) / PRODUCT),
    ]
    both = Work(forward.launches + backward.launches, forward.others + backward.others)
    return {"forward": (forward, floors[0]), "backward": (backward, floors[1]), "forward+backward": (both, sum(floors))}


def seconds(work: Work) -> tuple[float, list[str]]:
    """The time of all launches, and the kernels whose time is not known."""
    total, missing = 0.0, []
    for launch in work.launches:
        key = aot.key_of(launch, machine_code.MODELLED)
        code = aot.kept(key, True)
        if code is None:
            (code,) = aot.compiled([(launch, machine_code.MODELLED)])
            aot.keep(key, code)
        found = machine_code.model(launch, code)
        if found is None:
            missing.append(f"{launch.kernel.fn.__name__}, loops: {code.facts['loops']} found")
        else:
            total += found["microseconds"] * 1e-6
    total += sum(max(moved / COPY, flops / PRODUCT) for moved, flops in work.others)
    return total + GAP * (len(work.launches) + len(work.others)), missing


def predict(op: str, index: int) -> list[dict[str, Any]]:
    """The rows of one sample of an op."""
    from i2v_kernels.ops import base
    from i2v_kernels.testing import OPINFOS

    info = next(info for info in OPINFOS if info.name == op)
    with OnMeta():
        sample = info.models(CLIPS)[index].to(DTYPE, requires_grad=True)
    rows = []
    for name, (work, floor) in passes(info, sample).items():
        time, missing = seconds(work)
        time = max(time, floor)
        launches = len(work.launches) + len(work.others)
        about = {"op": op, "sample": sample.name, "dtype": str(DTYPE).removeprefix("torch."), "pass": name}
        share = None if missing else floor / time
        compiler = f"triton {importlib.import_module('triton').__version__}"
        rows.append(_row(about, backend_of(base.OPS[op]), share, floor, launches, compiler))
        if missing:
            rows[-1]["missing"] = missing
        share = next((s for (o, part, p), s in COMPILED_BY_NVCC.items() if (o, p) == (op, name) and part in sample.name), None)
        if share is not None:
            rows.append(_row(about, "cuda", share, floor, 1, "nvcc 13, sm_90a"))
    return rows


def _row(
    about: dict[str, str], backend: str, share: float | None, floor: float, launches: int, compiler: str
) -> dict[str, Any]:
    return {
        **about,
        "backend": backend,
        "share": share and round(share, 2),
        "microseconds": share and round(floor / share * 1e6, 1),
        "floor_us": round(floor * 1e6, 1),
        "launches": launches,
        "source": f"machine code of {compiler}, uncalibrated",
    }


def _predict(job: tuple[str, int]) -> list[dict[str, Any]]:
    return predict(*job)


def write(path: Path, ops: Sequence[str], processes: int) -> list[dict[str, Any]]:
    """Predict all calls of these ops' registry (without any, of all), and write them."""
    from i2v_kernels.testing import OPINFOS

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with OnMeta():
        jobs = [(info.name, i) for info in OPINFOS for i in range(len(info.models(CLIPS))) if not ops or info.name in ops]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(processes, get_context("spawn"), aot.prepare, (scratch,)) as pool,
    ):
        rows = [row for part in pool.map(_predict, jobs) for row in part]
    about = "Estimates for an H100 from machine code, uncalibrated; keys: bench/predictions.py"
    lines = ",\n".join(json.dumps(row) for row in rows)
    beside = path.with_suffix(".part")
    beside.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')
    beside.replace(path)
    return rows
