"""``python -m bench.models``: what each method adds to its image model, end to end.

Forward of a frozen ViT-B/16 with a method's modules, in this package's kernels and as published, beside the image model alone
(frame-mean CLIP). Random weights: the arithmetic is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from i2v_models import VideoCLIP, build, load_clip

from .__main__ import DTYPES, machine, save
from .measure import interleaved, start

METHODS = ("tokshift", "st_adapter", "aim")
ALONE = "image model"
FRAMES = 8


def models(name: str, device: str) -> dict[str, VideoCLIP]:
    """``ALONE``, and every method in kernels and plain."""
    torch.manual_seed(0)
    clip, _ = load_clip(name, None)
    clip.to(device)
    options = {"frames": FRAMES, "head": "linear", "captions": ["a", "b"]}
    found = {ALONE: build(clip, "frame_mean", **options)}
    for method in METHODS:
        found[method] = build(clip, method, kernels=True, **options)
        found[f"{method} as published"] = build(clip, method, kernels=False, **options)
    return {label: model.eval() for label, model in found.items()}


def forward(model: VideoCLIP, frames: Tensor, dtype: torch.dtype) -> None:
    """Below float32 under autocast, as models are trained and served."""
    with torch.no_grad(), torch.autocast(frames.device.type, dtype, enabled=dtype != torch.float32):
        model(frames)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--clips", type=int, help="clips a call; 1 on a CPU, 32 on a GPU")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="only this dtype")
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time per dtype")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args(argv)
    about = machine(options.device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, load {about['load']:.1f}\n")
    found = models(options.model, options.device)
    size = found[ALONE].visual.image_size[0]
    clips = options.clips or (32 if options.device == "cuda" else 1)
    frames = torch.randint(0, 256, (clips, FRAMES, size, size, 3), dtype=torch.uint8, device=options.device)
    rows = []
    for dtype in options.dtype or ("float32", "bfloat16"):
        calls: dict[str, Callable[[], object]] = {n: partial(forward, m, frames, DTYPES[dtype]) for n, m in found.items()}
        timings = interleaved(calls, options.device, options.seconds, cold=True)
        for name, ms in timings.items():
            cost = ms.median / timings[ALONE].median - 1
            rows.append({"model": options.model, "clips": clips, "dtype": dtype, "method": name, "ms": vars(ms), "cost": cost})
            print(f"{dtype:<10}{name:<26}{ms.median:8.1f} ({ms.low:.1f}-{ms.high:.1f}) ms  {cost:+7.1%}", flush=True)
    if options.json:
        save(options.json, about, rows)
    return 0


if __name__ == "__main__":
    start(main)
