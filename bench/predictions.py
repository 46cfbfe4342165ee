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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import aot, collect, machine_code, sm
from .collect import CLIPS, Work

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


def passes(info: Any, sample: Any) -> dict[str, tuple[Work, float]]:
    """Pass -> (what it launches, seconds that it takes at least)."""
    forward, backward = collect.passes(info, sample).values()
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
    sample = collect.on_meta(info, index, DTYPE)
    rows = []
    for name, (work, floor) in passes(info, sample).items():
        time, missing = seconds(work)
        time = max(time, floor)
        launches = len(work.launches) + len(work.others)
        about = {"op": op, "sample": sample.name, "dtype": str(DTYPE).removeprefix("torch."), "pass": name}
        share = None if missing else floor / time
        compiler = f"triton {importlib.import_module('triton').__version__}"
        rows.append(_row(about, collect.backend_of(base.OPS[op]), share, floor, launches, compiler))
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
    """Predict all calls of these ops (without any, of all), write them in place of theirs, and return them."""
    from i2v_kernels.testing import OPINFOS

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    jobs = [(info.name, i) for info in OPINFOS for i in range(len(info.models(CLIPS))) if not ops or info.name in ops]
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(processes, get_context("spawn"), aot.prepare, (scratch,)) as pool,
    ):
        found = [row for part in pool.map(_predict, jobs) for row in part]
    others = json.loads(path.read_text())["rows"] if ops and path.exists() else []  # they stay, in the registry's order
    places = [info.name for info in OPINFOS]
    rows = sorted(found + [row for row in others if row["op"] not in ops], key=lambda row: places.index(row["op"]))
    about = "Estimates for an H100 from machine code, uncalibrated; keys: bench/predictions.py"
    lines = ",\n".join(json.dumps(row) for row in rows)
    beside = path.with_suffix(".part")
    beside.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')
    beside.replace(path)
    return found
