"""Calls of each op drawn at random: shapes with 0 and 1 among them, and every option. The fuzz says what ``choose`` is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.activations import ACTIVATIONS
from .opinfo import Sample, randn

Choose = Callable[[Sequence[Any]], Any]

FEW = (2, 1, 3, 0)
FRAMES = (3, 1, 2, 4, 7, 8, 9, 16, 17)
CHANNELS = (8, 1, 3, 16, 20, 33, 64, 0)
ACTIVATION = (None, *ACTIVATIONS)
YES_NO = (False, True)


def temporal_attention(choose: Choose) -> Sample:
    shape = (choose(FEW), choose(FRAMES), choose(FEW), choose((2, 1, 3, 5)), choose((8, 1, 3, 16, 20, 64, 72, 0)))
    batch, frames, tokens, heads, dim = shape
    keys = frames
    args: tuple[Tensor, ...]
    if choose(YES_NO):
        args = (randn(batch, frames, tokens, 3, heads, dim),)
    else:
        keys = choose((frames, *FRAMES))
        args = (randn(*shape), randn(batch, keys, tokens, heads, dim, seed=1), randn(batch, keys, tokens, heads, dim, seed=2))
    options: dict[str, Any] = {"causal": choose(YES_NO), "scale": choose((None, 0.3, -1.0, 0))}
    if choose(YES_NO):
        options["bias"] = randn(heads, frames, keys, seed=3)
    if choose(YES_NO):
        options["mask"] = randn(batch, keys, seed=choose(range(4))) > choose((-0.5, 5.0))
    if choose(YES_NO):
        options["window"] = (choose((None, 0, 1, 4, 2**40)), choose((None, -1, 0, 2)))
    if choose(YES_NO):
        options["offsets"] = [choose((0, 1, -1, 2, -9, 2**63)) for _ in range(heads)]
    return Sample("drawn", args, options)


def token_shift(choose: Choose) -> Sample:
    batch, frames, tokens, channels = choose(FEW), choose((*FRAMES, 0)), choose((2, 1, 5, 0)), choose(CHANNELS)
    groups, left = [], channels
    for _ in range(choose((2, 1, 3, 0))):
        count = choose((left // 3, 1, left, 0))
        count = min(count, left)
        groups.append((count, choose((1, -1, 0, 2, -3, 9, -(2**63), 2**64))))
        left -= count
    options = {"padding": choose(("zeros", "edge", "wrap")), "residual": choose(YES_NO)}
    if choose(YES_NO):
        start = choose(range(tokens + 1))
        options["tokens"] = (start, choose(range(start, tokens + 1)), choose((1, 2, 2**70)))
    return Sample("drawn", (randn(batch, frames, tokens, channels), groups), options)


def _grid(choose: Choose) -> tuple[int, int, int, dict[str, Any]]:
    """Tokens, the kernel's height and width, and the options that tell of them."""
    height, width, prefix = choose((2, 1, 3, 5, 0)), choose((3, 1, 2, 6)), choose((0, 1, 2))
    kernel = choose(((1, 1), (3, 3), (1, 3), (5, 1), (5, 5)))
    options: dict[str, Any] = {"prefix": prefix}
    if kernel != (1, 1) or choose(YES_NO):
        options["grid"] = (height, width)
    return prefix + height * width, *kernel, options


def temporal_conv(choose: Choose) -> Sample:
    tokens, kh, kw, options = _grid(choose)
    channels, kt = choose(CHANNELS), choose((3, 1, 5, 7, 9))
    x = randn(choose(FEW), choose((*FRAMES, 0)), tokens, channels)
    options |= {"prefix_mode": choose(("zero", "copy")), "dilation": choose((1, 2, 2**70)), "activation": choose(ACTIVATION)}
    options["residual"] = choose(YES_NO)
    bias = (randn(channels, seed=2),) if choose(YES_NO) else ()
    return Sample("drawn", (x, randn(channels, 1, kt, kh, kw, seed=1) * 0.4, *bias), options)


def st_adapter(choose: Choose) -> Sample:
    tokens, kh, kw, options = _grid(choose)
    channels, width, kt = choose(CHANNELS), choose(CHANNELS), choose((3, 1, 5))
    x = randn(choose(FEW), choose((*FRAMES[:5], 0)), tokens, channels)
    weights = (randn(width, channels), randn(width, 1, kt, kh, kw, seed=1), randn(channels, width, seed=2))
    sizes = (width, width, channels)
    args = [x]
    for i, (weight, size) in enumerate(zip(weights, sizes)):
        args += [weight * 0.4, randn(size, seed=3 + i) if choose(YES_NO) else None]  # type: ignore[list-item]
    return Sample("drawn", tuple(args), {**options, "recompute": choose(YES_NO)})


def _rows(choose: Choose, channels: int) -> Tensor:
    return randn(*[choose(FEW) for _ in range(choose((3, 0, 1, 2)))], channels)


def bottleneck_adapter(choose: Choose) -> Sample:
    channels, width = choose(CHANNELS), choose(CHANNELS)
    args = [_rows(choose, channels)]
    for i, (weight, size) in enumerate(((randn(width, channels), width), (randn(channels, width, seed=2), channels))):
        args += [weight * 0.4, randn(size, seed=3 + i) if choose(YES_NO) else None]  # type: ignore[list-item]
    options = {"activation": choose(ACTIVATION), "scale": choose((1, 0.5, -2.0, 0)), "residual": choose(YES_NO)}
    if channels > 1 and choose(YES_NO):
        options["norm"] = (randn(channels, seed=5), randn(channels, seed=6) if choose(YES_NO) else None, 1e-2)
    return Sample("drawn", tuple(args), {**options, "recompute": choose(YES_NO)})


def lora_linear(choose: Choose) -> Sample:
    channels, out, rank = choose(CHANNELS), choose(CHANNELS), choose((4, 1, 8, 0))
    args = (randn(out, channels), randn(rank, channels, seed=1), randn(out, rank, seed=2))
    bias = (randn(out, seed=3),) if choose(YES_NO) else ()
    return Sample("drawn", (_rows(choose, channels), *args, *bias), {"scaling": choose((1, 0.5, -2.0, 0))})


def patch_embed(choose: Choose) -> Sample:
    height, width = choose((2, 1, 3, 4, 7)), choose((2, 1, 5, 8))
    shape = (choose(FEW), choose(FEW), height * choose((1, 2, 3)), width * choose((1, 2, 3)), 3)
    frames = (randn(*shape) * 100 + 120).clamp(0, 255).to(torch.uint8)
    channels = choose(CHANNELS)
    bias = (randn(channels, seed=1),) if choose(YES_NO) else ()
    colours = {
        "mean": choose(((0.48, 0.46, 0.41), (0, 0, 0), (1, -0.3, 1.2))),
        "std": choose(((0.27, 0.26, 0.28), (1, 2, 0.5))),
    }
    return Sample("drawn", (frames, randn(channels, 3, height, width) * 0.3, *bias), colours)


CALLS: dict[str, Callable[[Choose], Sample]] = {
    draw.__name__: draw
    for draw in (temporal_attention, token_shift, temporal_conv, st_adapter, bottleneck_adapter, lora_linear, patch_embed)
}
