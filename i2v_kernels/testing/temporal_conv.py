"""What tests and benches know of ``temporal_conv``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import temporal_conv
from .drawn import ACTIVATION, CHANNELS, FEW, FRAMES, YES_NO, grid
from .opinfo import Choose, OpInfo, Sample, inputs_and_output, randn, sequence_first


def _samples() -> list[Sample]:
    x, grid = randn(2, 8, 13, 20), {"grid": (3, 4), "prefix": 1}

    def weight(c: int, *kernel: int) -> Tensor:
        return randn(c, 1, *kernel, seed=4)

    return [
        Sample("(3,1,1)", (x, weight(20, 3, 1, 1), randn(20))),
        Sample("no bias", (x, weight(20, 3, 1, 1)), {"prefix": 1}),
        Sample("copied prefix", (x, weight(20, 3, 1, 1), randn(20)), {"prefix": 1, "prefix_mode": "copy"}, telling=True),
        Sample("(5,1,1)", (x, weight(20, 5, 1, 1), randn(20)), grid),
        Sample("(7,1,1)", (x[:, :3], weight(20, 7, 1, 1), randn(20)), grid),
        Sample("(3,3,3)", (x, weight(20, 3, 3, 3), randn(20)), grid),
        Sample("(1,3,3)", (x, weight(20, 1, 3, 3), randn(20)), {**grid, "prefix_mode": "copy"}),
        Sample("(1,5,3)", (x, weight(20, 1, 5, 3)), grid),
        Sample("(1,1,1)", (x, weight(20, 1, 1, 1), randn(20))),
        Sample("C=130", (randn(1, 4, 5, 130), weight(130, 3, 1, 1), randn(130))),
        Sample("sequence first", (sequence_first(x), weight(20, 3, 1, 1), randn(20)), {"prefix": 1}, telling=True),
        Sample("residual", (x, weight(20, 3, 1, 1), randn(20)), {"prefix": 1, "residual": True}, telling=True),
        Sample("dilation", (x, weight(20, 3, 1, 1), randn(20)), {"prefix": 1, "dilation": 2}),
        Sample("far dilation", (x, weight(20, 5, 3, 3), randn(20)), {**grid, "dilation": 7, "prefix_mode": "copy"}),
        Sample("gelu", (x, weight(20, 3, 1, 1), randn(20)), {**grid, "activation": "gelu"}),
        Sample("quick_gelu", (x, weight(20, 3, 1, 1)), {**grid, "activation": "quick_gelu", "prefix_mode": "copy"}),
        Sample("relu, residual, (3,3,3)", (x, weight(20, 3, 3, 3)), {**grid, "activation": "relu", "residual": True}),
        Sample(
            "everything",
            (sequence_first(x), weight(20, 3, 1, 3), randn(20)),
            {**grid, "dilation": 3, "activation": "silu", "residual": True},
        ),
        Sample("one frame", (x[:, :1], weight(20, 3, 3, 3), randn(20)), grid),
        Sample("no frames", (x[:, :0], weight(20, 3, 1, 1), randn(20))),
        Sample("no tokens", (x[:, :, :0], weight(20, 3, 1, 1), randn(20))),
        Sample("only prefix", (x[:, :, :1], weight(20, 3, 1, 1), randn(20)), {"prefix": 1}),
        Sample("no clips", (x[:0], weight(20, 3, 1, 1), randn(20))),
        Sample("no channels", (x[..., :0], weight(0, 3, 1, 1), randn(0))),
    ]


def _models(clips: int) -> list[Sample]:
    """ST-Adapter's widths on a ViT-B/16, with class tokens (N = 197) and without (196), in every kernel size; few clips too."""
    shapes = [(few, n, c) for few, c in ((True, 384), (False, 384), (False, 768)) for n in (196, 197)]
    tokens = {(few, n, c): randn(max(clips // 4, 1) if few else clips, 8, n, c) for few, n, c in shapes}

    def call(shape: tuple[bool, int, int], kernel: tuple[int, int, int]) -> Sample:
        (few, n, c), size = shape, ",".join(map(str, kernel))
        name = f"N={n} C={c} ({size}){', few clips' if few else ''}"
        options = {"grid": (14, 14), "prefix": n - 196}
        return Sample(name, (tokens[shape], randn(c, 1, *kernel, seed=4), randn(c)), options)

    kernels = ((3, 1, 1), (5, 1, 1), (1, 3, 3), (5, 5, 5), (3, 3, 3))
    calls = [call(shape, kernel) for kernel in kernels for shape in shapes]
    ordinary = len(shapes) - 1
    return [replace(calls[ordinary], name="ViT-B/16 T=8 (3,1,1)"), *calls[:ordinary], *calls[ordinary + 1 :]]


def _bad() -> list[Any]:
    x, w = torch.randn(2, 8, 13, 20), torch.randn(20, 1, 3, 1, 1)
    return [
        ("three dimensions", (x[0], w), {}, ValueError, "x.shape=(8, 13, 20)"),
        ("integers", (x.int(), w.int()), {}, TypeError, "x.dtype=torch.int32"),
        ("weight of another C", (x, w[:10]), {}, ValueError, "weight.shape=(10, 1, 3, 1, 1)"),
        ("weight of another dtype", (x, w.half()), {}, TypeError, "weight.dtype=torch.float16"),
        ("even kernel", (x, torch.randn(20, 1, 2, 1, 1)), {}, ValueError, "must be odd"),
        ("no grid", (x, torch.randn(20, 1, 3, 3, 3)), {}, ValueError, "grid=None"),
        ("another grid", (x, w), {"grid": (3, 3), "prefix": 1}, ValueError, "is not N=13"),
        ("prefix too long", (x, w), {"prefix": 14}, ValueError, "prefix=14"),
        ("unknown prefix mode", (x, w), {"prefix_mode": "zeros"}, ValueError, "prefix_mode='zeros'"),
        ("no dilation", (x, w), {"dilation": 0}, ValueError, "dilation=0"),
        ("half a dilation", (x, w), {"dilation": 1.5}, TypeError, "dilation=1.5"),
        ("unknown activation", (x, w), {"activation": "tanh"}, ValueError, "activation='tanh'"),
        ("residual as a tensor", (x, w), {"residual": x}, TypeError, "residual="),
        ("bias of another shape", (x, w, torch.zeros(3)), {}, ValueError, "bias.shape=(3,)"),
        ("weight as a list", (x, [1.0]), {}, TypeError, "weight must be a torch.Tensor [C, 1, kt, kh, kw], got list"),
        ("kernel of nothing", (x, torch.randn(20, 1, 0, 1, 1)), {}, ValueError, "must be odd"),
        ("a grid of one number", (x, w), {"grid": (13,)}, TypeError, "grid=(13,) must be 2 ints (H, W)"),
        ("a number as grid", (x, w), {"grid": 13}, TypeError, "grid=13 must be 2 ints"),
        ("a negative grid", (x, w), {"grid": (-1, -13)}, ValueError, "grid[0]=-1"),
        ("half a grid", (x, w), {"grid": (6.5, 2)}, TypeError, "grid[0]=6.5"),
        ("an endless grid", (x[:, :, :0], w), {"grid": (2**64, 0)}, ValueError, f"grid[0]={2**64}"),
        ("prefix as a bool", (x, w), {"prefix": True}, TypeError, "prefix=True"),
        ("prefix mode as a number", (x, w), {"prefix_mode": 1}, ValueError, "prefix_mode=1"),
        ("activation as a function", (x, w), {"activation": torch.relu}, ValueError, "activation=<built-in"),
        ("residual as a number", (x, w), {"residual": 1}, TypeError, "residual=1 must be a bool"),
        ("unknown backend", (x, w), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, w), {"backend": "cuda"}, NotImplementedError, "the tensors are on cpu"),
    ]


def _flops(sample: Sample) -> int:
    x, weight = sample.args[:2]
    patches = x.shape[2] - sample.kwargs.get("prefix", 0)
    return 2 * x.shape[0] * x.shape[1] * patches * weight.numel()


def _drawn(choose: Choose) -> Sample:
    tokens, kh, kw, options = grid(choose)
    channels, kt = choose(CHANNELS), choose((3, 1, 5, 7, 9))
    x = randn(choose(FEW), choose((*FRAMES, 0)), tokens, channels)
    options |= {"prefix_mode": choose(("zero", "copy")), "dilation": choose((1, 2, 2**70)), "activation": choose(ACTIVATION)}
    options["residual"] = choose(YES_NO)
    bias = (randn(channels, seed=2),) if choose(YES_NO) else ()
    return Sample("drawn", (x, randn(channels, 1, kt, kh, kw, seed=1) * 0.4, *bias), options)


INFO = OpInfo(
    "temporal_conv",
    temporal_conv,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=inputs_and_output,
    flops=_flops,
    pads=True,
)
