"""``python -m bench.layers``: modules of ``i2v_kernels.nn`` beside the published ones, with their weights, by turns.

Forward without gradients, and forward and backward to all parameters: of frozen features, as EVL trains, and to the features
too. How many times faster is the median of the rounds' ratios; peak memory is what a call takes beyond its arguments.
Modules that give other numbers than the published ones stop the run.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import i2v_kernels.nn as ours

from . import published
from .__main__ import DTYPES, machine, write
from .measure import rounds, start, summary
from .memory import peak

Inputs = tuple[Tensor, Tensor]
MODES = ("forward", "step", "step, features too")


def evl(queries: int, clips: int, channels: int, heads: int, tokens: int) -> tuple[nn.Module, nn.Module, Inputs]:
    """EVL's decoder layer: ours takes features as a backbone has them."""
    plain, layer = published.EVLDecoderLayer(channels, heads), ours.EVLDecoderLayer(channels, heads)
    layer.load_state_dict(plain.state_dict())
    return plain, layer, (torch.randn(clips, queries, channels), torch.randn(clips, 8, tokens, channels))


def x_pool(pair: tuple[type[nn.Module], type[nn.Module]], clips: int) -> tuple[nn.Module, nn.Module, Inputs]:
    """X-Pool's layer, 64 texts and videos for each clip of the others."""
    plain, layer = (kind(512, dropout=0.0) for kind in pair)
    layer.load_state_dict(plain.state_dict())
    return plain, layer, (torch.randn(64 * clips, 512), torch.randn(64 * clips, 12, 512))


class Similarity(ours.TextConditionedPool):
    """Its similarities for its output."""

    def forward(self, text: Tensor, video: Tensor) -> Tensor:  # type: ignore[override]
        return self.similarity(text, video)


LAYERS: dict[str, Callable[[int], tuple[nn.Module, nn.Module, Inputs]]] = {
    "EVL decoder, B/16 T=8": partial(evl, 1, channels=768, heads=12, tokens=197),
    "EVL decoder, L/14 T=8": partial(evl, 1, channels=1024, heads=16, tokens=257),
    "EVL decoder, B/16 T=8, 16 queries": partial(evl, 16, channels=768, heads=12, tokens=197),
    "EVL decoder, B/16 T=8, 32 queries": partial(evl, 32, channels=768, heads=12, tokens=197),
    "X-Pool, 12 frames": partial(x_pool, (published.XPool, ours.TextConditionedPool)),
    "X-Pool's similarities, 12 frames": partial(x_pool, (published.XPoolSimilarity, Similarity)),
}


def forward(layer: nn.Module, x: Tensor, features: Tensor) -> Tensor:
    flat = isinstance(layer, published.EVLDecoderLayer)
    return layer(x, features.flatten(1, 2) if flat else features)


def call(layer: nn.Module, inputs: Inputs, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            forward(layer, *inputs)
        return
    wanted = [*layer.parameters(), *([inputs[1]] if "features" in mode else [])]
    torch.autograd.grad(forward(layer, *inputs).float().square().mean(), wanted)


def measure(name: str, clips: int, device: str, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """One row per mode."""
    plain, layer, inputs = LAYERS[name](clips)
    plain, layer = plain.to(device, DTYPES[dtype]), layer.to(device, DTYPES[dtype])
    given = tuple(x.to(device, DTYPES[dtype]) for x in inputs)
    got, want = (forward(m, *given).double() for m in (layer, plain))
    if not (got - want).norm() <= max(8 * torch.finfo(DTYPES[dtype]).eps, 4e-6) * want.norm():
        raise SystemExit(f"{name}: differs from the published module by {((got - want).norm() / want.norm()).item():.1e}")
    rows = []
    for mode in MODES:
        x, features = given[0].detach(), given[1].detach().requires_grad_("features" in mode)
        calls = {label: partial(call, m, (x, features), mode) for label, m in (("published", plain), ("ours", layer))}
        times = rounds(calls, device, seconds)
        faster = summary([a / b for a, b in zip(times["published"], times["ours"])])
        ms = {label: summary(each) for label, each in times.items()}
        mib = {label: peak(run, device) for label, run in calls.items()}
        about = {"layer": name, "clips": clips, "dtype": dtype, "mode": mode, "rounds": len(times["ours"])}
        rows.append({**about, "faster": vars(faster), "ms": {label: vars(t) for label, t in ms.items()}, "peak_mib": mib})
        spread = f"{ms['ours'].median:.2f} ({ms['ours'].low:.2f}-{ms['ours'].high:.2f})"
        ratio = f"{faster.median:.2f} ({faster.low:.2f}-{faster.high:.2f})"
        shown = f"{name:<36}{dtype:<10}{mode:<20}{spread:<24}{ms['published'].median:<14.2f}{ratio:<20}"
        print(f"{shown}{mib['ours']:.0f}, {mib['published']:.0f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layer", choices=list(LAYERS), action="append", help="only this layer")
    parser.add_argument("--clips", type=int, help="clips a call; 2 on a CPU, 64 on a GPU")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="only this dtype")
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time per layer, dtype and mode")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args(argv)
    about, clips = machine(options.device), options.clips or (64 if options.device == "cuda" else 2)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, load {about['load']:.1f}\n")
    head = f"{'layer':<36}{'dtype':<10}{'mode':<20}{'ms (20-80 %)':<24}{'published ms':<14}"
    print(f"{head}{'times faster':<20}peak MiB, published")
    rows: list[dict[str, Any]] = []
    for name, dtype in itertools.product(options.layer or LAYERS, options.dtype or ("float32", "bfloat16")):
        torch.manual_seed(0)
        rows += measure(name, clips, options.device, dtype, options.seconds)
    if options.json:
        write(options.json, about, rows)
    return 0


if __name__ == "__main__":
    start(main)
