"""What tests and benches know of ``st_adapter``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import st_adapter
from .drawn import CHANNELS, FEW, FRAMES, YES_NO, grid
from .opinfo import Choose, OpInfo, Sample, inputs_and_output, randn, sequence_first


def _parameters(channels: int, width: int, *kernel: int) -> tuple[Tensor, ...]:
    return (
        randn(width, channels) * max(channels, 1) ** -0.5,
        randn(width, seed=1),
        randn(width, 1, *kernel, seed=2) * 0.3,
        randn(width, seed=3),
        randn(channels, width, seed=4) * max(width, 1) ** -0.5,
        randn(channels, seed=5),
    )


def _samples() -> list[Sample]:
    x, patches = randn(3, 4, 13, 20), {"grid": (3, 4)}
    down, _, conv, _, up, _ = _parameters(20, 12, 3, 1, 1)
    return [
        Sample("(3,1,1)", (x, *_parameters(20, 12, 3, 1, 1))),
        Sample("(3,3,3)", (x, *_parameters(20, 8, 3, 3, 3)), patches),
        Sample("no biases", (x, down, None, conv, None, up, None)),
        Sample("no class token", (x, *_parameters(20, 12, 3, 1, 1)), {"prefix": 0}),
        Sample("two class tokens", (x, *_parameters(20, 12, 3, 1, 3)), {"prefix": 2, "grid": (1, 11)}),
        Sample("recompute", (x, *_parameters(20, 12, 3, 1, 1)), {"recompute": True}),
        Sample("wide bottleneck", (x, *_parameters(20, 40, 3, 1, 1))),
        Sample("sequence first", (sequence_first(x), *_parameters(20, 12, 3, 3, 1)), patches, telling=True),
        Sample("tokens first in memory", (randn(13, 3, 4, 20).permute(1, 2, 0, 3), *_parameters(20, 12, 3, 1, 1))),
        Sample("frames first in memory", (randn(4, 3, 13, 20).transpose(0, 1), *_parameters(20, 12, 3, 1, 1))),
        Sample("one frame", (x[:, :1], *_parameters(20, 12, 3, 1, 1))),
        Sample("no frames", (x[:, :0], *_parameters(20, 12, 3, 1, 1))),
        Sample("only class tokens", (x[:, :, :1], *_parameters(20, 12, 3, 1, 1))),
        Sample("no clips", (x[:0], *_parameters(20, 12, 3, 1, 1))),
        Sample("no tokens", (x[:, :, :0], *_parameters(20, 12, 3, 1, 1)), {"prefix": 0}),
        Sample("no channels", (x[..., :0], *_parameters(0, 12, 3, 1, 1))),
        Sample("no bottleneck", (x, *_parameters(20, 0, 3, 1, 1))),
        Sample("no bottleneck, no biases", (x, down[:0], None, conv[:0], None, up[:, :0].contiguous(), None)),
        Sample("no channels, no frames", (x[:, :0, :, :0], *_parameters(0, 12, 3, 1, 1))),
        Sample("no bottleneck, no frames", (x[:, :0], *_parameters(20, 0, 3, 1, 1))),
    ]


def _models(clips: int) -> list[Sample]:
    return [
        Sample("ViT-B/16 T=8", (randn(clips, 8, 197, 768), *_parameters(768, 384, 3, 1, 1)), {"grid": (14, 14)}),
        Sample("ViT-L/14 T=8", (randn(clips, 8, 257, 1024), *_parameters(1024, 384, 3, 1, 1)), {"grid": (16, 16)}),
    ]


def _bad() -> list[Any]:
    x = torch.randn(2, 8, 13, 20)
    good = tuple(t.float() for t in _parameters(20, 12, 3, 1, 1))

    def but(place: int, value: object) -> tuple[Any, ...]:
        return (x, *good[:place], value, *good[place + 1 :])

    return [
        ("three dimensions", (x[0], *good), {}, ValueError, "x.shape=(8, 13, 20)"),
        ("integers", (x.int(), *good), {}, TypeError, "x.dtype=torch.int32"),
        ("down of another C", but(0, good[0][:, :5]), {}, ValueError, "down_weight.shape=(12, 5)"),
        ("conv of another width", but(2, good[2][:5]), {}, ValueError, "conv_weight.shape=(5, 1, 3, 1, 1), but [R, 1,"),
        ("even kernel", but(2, torch.randn(12, 1, 2, 1, 1)), {}, ValueError, "must be odd"),
        ("up the wrong way", but(4, good[4].T.contiguous()), {}, ValueError, "up_weight.shape=(12, 20)"),
        ("bias of another shape", but(3, torch.zeros(3)), {}, ValueError, "conv_bias.shape=(3,)"),
        ("bias of another dtype", but(5, good[5].half()), {}, TypeError, "up_bias.dtype=torch.float16"),
        ("no grid", but(2, torch.randn(12, 1, 3, 3, 3)), {}, ValueError, "grid=None"),
        ("another grid", (x, *good), {"grid": (3, 3)}, ValueError, "is not N=13"),
        ("recompute as a number", (x, *good), {"recompute": 1}, TypeError, "recompute=1"),
        ("a grid of one number", (x, *good), {"grid": (12,)}, TypeError, "grid=(12,) must be 2 ints"),
        ("conv as a list", but(2, [1.0]), {}, TypeError, "conv_weight must be a torch.Tensor [R, 1, kt, kh, kw], got list"),
        ("prefix as a float", (x, *good), {"prefix": 1.0}, TypeError, "prefix=1.0"),
        ("unknown backend", (x, *good), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, *good), {"backend": "triton"}, NotImplementedError, "the tensors are on cpu"),
    ]


def _flops(sample: Sample) -> int:
    """All rows through both products, patches through the convolution."""
    x, down, _, conv = sample.args[:4]
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    return rows * (4 * down.numel() + 2 * conv.numel())


def _drawn(choose: Choose) -> Sample:
    tokens, kh, kw, options = grid(choose)
    channels, width, kt = choose(CHANNELS), choose(CHANNELS), choose((3, 1, 5))
    x = randn(choose(FEW), choose((*FRAMES[:5], 0)), tokens, channels)
    weights = (randn(width, channels), randn(width, 1, kt, kh, kw, seed=1), randn(channels, width, seed=2))
    sizes = (width, width, channels)
    args = [x]
    for i, (weight, size) in enumerate(zip(weights, sizes)):
        args += [weight * 0.4, randn(size, seed=3 + i) if choose(YES_NO) else None]  # type: ignore[list-item]
    return Sample("drawn", tuple(args), {**options, "recompute": choose(YES_NO)})


INFO = OpInfo(
    "st_adapter",
    st_adapter,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=inputs_and_output,
    flops=_flops,
    products=True,
    pads=True,
    spreads=True,
)
