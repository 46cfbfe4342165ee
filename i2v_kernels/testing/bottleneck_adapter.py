"""What tests and benches know of ``bottleneck_adapter``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import bottleneck_adapter
from .drawn import ACTIVATION, CHANNELS, YES_NO, rows
from .opinfo import Choose, OpInfo, Sample, inputs_and_output, randn, sequence_first


def _parameters(channels: int, width: int) -> tuple[Tensor, ...]:
    return (
        randn(width, channels) * max(channels, 1) ** -0.5,
        randn(width, seed=1),
        randn(channels, width, seed=2) * max(width, 1) ** -0.5,
        randn(channels, seed=3),
    )


def _samples() -> list[Sample]:
    x, parameters = randn(2, 4, 5, 24), _parameters(24, 10)
    down, _, up, _ = parameters
    norm = (randn(24, seed=4), randn(24, seed=5), 1e-5)
    nan = x.clone()
    nan[1, 2, 3, 4] = float("nan")
    return [
        Sample("gelu", (x, *parameters)),
        Sample("quick_gelu", (x, *parameters), {"activation": "quick_gelu", "scale": 0.5}),
        Sample("relu", (x, *parameters), {"activation": "relu", "scale": 0.1, "residual": False}),
        Sample("silu, no biases", (x, down, None, up, None), {"activation": "silu", "scale": -2.0}),
        Sample("linear", (x, *parameters), {"activation": None}),
        Sample("norm", (x, *parameters), {"norm": norm}),
        Sample("norm without bias, update alone", (x, *parameters), {"norm": (norm[0], None, 1e-6), "residual": False}),
        Sample("no biases, update alone", (x, down, None, up, None), {"residual": False}),
        Sample("norm, recompute", (x, *parameters), {"norm": norm, "recompute": True}),
        Sample("recompute", (x, *parameters), {"recompute": True}),
        Sample("wider than x", (x, *_parameters(24, 40))),
        Sample("wider than a tile", (x, *_parameters(24, 300)), {"activation": "relu"}),
        Sample("sequence first", (sequence_first(x), *parameters), {"norm": norm}, telling=True),
        Sample("part of a row", (randn(2, 4, 5, 40)[..., 8:32], *parameters)),
        Sample("every other frame", (randn(2, 8, 5, 24)[:, ::2], *parameters)),
        Sample("rows", (randn(7, 24), *parameters)),
        Sample("nan", (nan, *parameters), {"activation": "relu"}),
        Sample("one row", (randn(24), *parameters), {"norm": norm}),
        Sample("one row, recompute", (randn(24), *parameters), {"recompute": True}),
        Sample("no tokens", (x[:, :, :0], *parameters), {"norm": norm}),
        Sample("no clips", (x[:0], *parameters)),
        Sample("no channels", (x[..., :0], *_parameters(0, 10))),
        Sample("no scale", (x, *parameters), {"scale": 0}),
        Sample("no bottleneck", (x, *_parameters(24, 0)), {"norm": norm, "scale": 0.5}),
        Sample("no bottleneck, no biases", (x, down[:0], None, up[:, :0].contiguous(), None), {"residual": False}),
    ]


def _models(clips: int) -> list[Sample]:
    x = randn(clips, 8, 197, 768)
    norm = (randn(768, seed=4), randn(768, seed=5), 1e-5)
    return [
        Sample("AIM ViT-B/16 T=8 R=192", (x, *_parameters(768, 192))),
        Sample("AdaptFormer ViT-B/16 T=8 R=64", (x, *_parameters(768, 64)), {"activation": "relu", "scale": 0.1, "norm": norm}),
    ]


def _bad() -> list[Any]:
    x, good = torch.randn(2, 4, 5, 24), tuple(t.float() for t in _parameters(24, 10))

    def but(place: int, value: object) -> tuple[Any, ...]:
        return (x, *good[:place], value, *good[place + 1 :])

    return [
        ("a list", ([1.0], *good), {}, TypeError, "x must be a torch.Tensor"),
        ("no dimension", (torch.tensor(1.0), *good), {}, ValueError, "x.shape=()"),
        ("integers", (x.int(), *good), {}, TypeError, "x.dtype=torch.int32"),
        ("channels apart", (x.transpose(1, 3), *_parameters(4, 3)), {}, ValueError, "stride"),
        ("down of another C", but(0, good[0][:, :5]), {}, ValueError, "down_weight.shape=(10, 5)"),
        ("up the wrong way", but(2, good[2].T.contiguous()), {}, ValueError, "up_weight.shape=(10, 24)"),
        ("bias of another shape", but(1, torch.zeros(3)), {}, ValueError, "down_bias.shape=(3,)"),
        ("bias of another dtype", but(3, good[3].half()), {}, TypeError, "up_bias.dtype=torch.float16"),
        ("unknown activation", (x, *good), {"activation": "tanh"}, ValueError, "activation='tanh'"),
        ("scale as a tensor", (x, *good), {"scale": torch.ones(())}, TypeError, "scale=tensor(1.)"),
        ("residual as a number", (x, *good), {"residual": 1}, TypeError, "residual=1"),
        ("norm of a module", (x, *good), {"norm": torch.nn.LayerNorm(24)}, TypeError, "norm=LayerNorm"),
        ("negative eps", (x, *good), {"norm": (torch.ones(24), None, -1.0)}, ValueError, "norm[2]=-1.0"),
        ("norm of another C", (x, *good), {"norm": (torch.ones(3), None, 1e-5)}, ValueError, "norm[0].shape=(3,)"),
        ("recompute as a number", (x, *good), {"recompute": 1}, TypeError, "recompute=1"),
        ("eps that is no number", (x, *good), {"norm": (torch.ones(24), None, float("nan"))}, ValueError, "norm[2]=nan"),
        ("scale as a bool", (x, *good), {"scale": True}, TypeError, "scale=True must be a number"),
        ("an endless scale", (x, *good), {"scale": 10**400}, ValueError, "scale is an int of 1329 bits"),
        ("activation as a number", (x, *good), {"activation": 1}, ValueError, "activation=1"),
        ("unknown backend", (x, *good), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, *good), {"backend": "triton"}, NotImplementedError, "the tensors are on cpu"),
    ]


def _flops(sample: Sample) -> int:
    x, down = sample.args[:2]
    return 4 * x.shape[:-1].numel() * down.numel()


def _drawn(choose: Choose) -> Sample:
    channels, width = choose(CHANNELS), choose(CHANNELS)
    args = [rows(choose, channels)]
    for i, (weight, size) in enumerate(((randn(width, channels), width), (randn(channels, width, seed=2), channels))):
        args += [weight * 0.4, randn(size, seed=3 + i) if choose(YES_NO) else None]  # type: ignore[list-item]
    options = {"activation": choose(ACTIVATION), "scale": choose((1, 0.5, -2.0, 0)), "residual": choose(YES_NO)}
    if channels > 1 and choose(YES_NO):
        options["norm"] = (randn(channels, seed=5), randn(channels, seed=6) if choose(YES_NO) else None, 1e-2)
    return Sample("drawn", tuple(args), {**options, "recompute": choose(YES_NO)})


INFO = OpInfo(
    "bottleneck_adapter",
    bottleneck_adapter,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=inputs_and_output,
    flops=_flops,
    products=True,
)
