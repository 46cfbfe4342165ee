"""Calls of kernels and nothing else, for NVIDIA's tools to look at: ``sanitize`` or ``profile``."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import place

TRITON_SAMPLES = 3  # of each op: the CUDA C++ kernels are ours alone, Triton's addresses come from one place
PROFILED = (("temporal_attention", "triton"), ("temporal_conv", "triton"), ("token_shift", "triton"))


def to_sanitize() -> Iterator[tuple[Any, str, Any, Any]]:
    """(OpInfo, backend, sample, dtype), by worth: each backend's first calls before all the others."""
    import torch

    found = []
    for info, backend in place.pairs(("cuda", "triton")):
        samples = info.samples()
        count = 1 if place.STUB else len(samples) if backend == "cuda" else TRITON_SAMPLES
        for dtype in (torch.bfloat16, torch.float32)[: 1 if place.STUB or backend == "triton" else 2]:
            found += [(dtype == torch.float32, i, info, backend, sample, dtype) for i, sample in enumerate(samples[:count])]
    found.sort(key=lambda each: (each[0], each[1]))
    return iter([each[2:] for each in found])


def run(info: Any, backend: str, sample: Any, dtype: Any) -> str | None:
    """Forward and backward; why not, if the backend does not take the call."""
    import torch

    placed = sample.to(dtype, place.DEVICE, requires_grad=True)
    why_not = place.cannot(info, placed, backend)
    if why_not is None:
        out = info.op(*placed.args, **placed.kwargs, backend=backend)
        torch.autograd.grad(out, placed.tensors(), torch.ones_like(out))
        place.synchronize()
    return why_not


def sanitize(options: argparse.Namespace) -> int:
    begun, ran, failed, cut = time.monotonic(), Counter(), [], 0
    for i, (info, backend, sample, dtype) in enumerate(to_sanitize()):
        if i % options.parts != options.part:
            continue
        if time.monotonic() - begun > options.seconds:
            cut += 1
            continue
        name = f"{info} {backend}: {sample.name}, {dtype}"
        print(name, flush=True)  # before it runs: what the tool reports next belongs to it
        try:
            why_not = run(info, backend, sample, dtype)
        except Exception as error:
            failed.append(f"{name}: {place.telling(error)}")
            print(failed[-1], flush=True)
            continue
        if why_not is None:
            ran[f"{info} {backend}"] += 1
        else:
            print(f"not run: {name}: {why_not}")
    place.write_json(options.record, {"ran": ran, "failed": failed, "cut": cut})
    return int(bool(failed))


def profile(options: argparse.Namespace) -> int:
    """Each kernel warmed up, then once, forward and backward, between the profiler's start and stop."""
    import torch

    profiler, calls = torch.cuda.profiler, 0
    for info, backend in place.pairs():
        if (info.name, backend) not in PROFILED:
            continue
        call = place.models(info, 1 if place.STUB else 64)[0]
        run(info, backend, call, torch.bfloat16)
        if not place.STUB:
            profiler.start()
        run(info, backend, call, torch.bfloat16)
        if not place.STUB:
            profiler.stop()
        calls += 1
    return place.evidence(options.record, calls, 0, f"{calls} ops under the profiler: see the log")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.calls", description=__doc__)
    parser.add_argument("what", choices=("sanitize", "profile"))
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args(argv)
    place.prepare()
    return sanitize(options) if options.what == "sanitize" else profile(options)


if __name__ == "__main__":
    sys.exit(main())
