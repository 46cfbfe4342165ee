"""What tests and benches know of ``lora_linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import lora_linear
from .drawn import CHANNELS, YES_NO, rows
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn, sequence_first


def _parameters(channels: int, out: int, rank: int) -> tuple[Tensor, ...]:
    return (
        randn(out, channels) * max(channels, 1) ** -0.5,
        randn(rank, channels, seed=1) * max(channels, 1) ** -0.5,
        randn(out, rank, seed=2),
        randn(out, seed=3),
    )


def _samples() -> list[Sample]:
    x, parameters = randn(2, 4, 5, 24), _parameters(24, 18, 4)
    return [
        Sample("plain", (x, *parameters)),
        Sample("no bias", (x, *parameters[:3]), {"scaling": 0.5}),
        Sample("scaled", (x, *parameters), {"scaling": -2.0}),
        Sample("rank 1", (x, *_parameters(24, 40, 1))),
        Sample("rank 0", (x, *_parameters(24, 18, 0))),
        Sample("sequence first", (sequence_first(x), *parameters), telling=True),
        Sample("every other frame", (randn(2, 8, 5, 24)[:, ::2], *parameters)),
        Sample("rows", (randn(7, 24), *parameters)),
        Sample("one row", (randn(24), *parameters)),
        Sample("no tokens", (x[:, :, :0], *parameters)),
        Sample("no clips", (x[:0], *parameters)),
        Sample("no channels", (x[..., :0], *_parameters(0, 18, 4))),
        Sample("no outputs", (x, *_parameters(24, 0, 4))),
        Sample("no scaling", (x, *parameters), {"scaling": 0.0}),
    ]


def _models(clips: int) -> list[Sample]:
    x = randn(clips, 8, 197, 768)
    return [
        Sample("ViT-B/16 T=8, projection, r=8", (x, *_parameters(768, 768, 8)), {"scaling": 2.0}),
        Sample("ViT-B/16 T=8, QKV, r=16", (x, *_parameters(768, 2304, 16)), {"scaling": 2.0}),
    ]


def _bad() -> list[Any]:
    x, good = torch.randn(2, 4, 5, 24), tuple(t.float() for t in _parameters(24, 18, 4))

    def but(place: int, value: object) -> tuple[Any, ...]:
        return (x, *good[:place], value, *good[place + 1 :])

    return [
        ("a list", ([1.0], *good), {}, TypeError, "x must be a torch.Tensor"),
        ("integers", (x.int(), *good), {}, TypeError, "x.dtype=torch.int32"),
        ("weight of another C", but(0, good[0][:, :5]), {}, ValueError, "weight.shape=(18, 5)"),
        ("another rank", but(2, good[2][:, :3]), {}, ValueError, "lora_b.shape=(18, 3)"),
        ("A and B exchanged", (x, good[0], good[2], good[1], good[3]), {}, ValueError, "lora_a.shape=(18, 4)"),
        ("bias of another dtype", but(3, good[3].half()), {}, TypeError, "bias.dtype=torch.float16"),
        ("scaling as a string", (x, *good), {"scaling": "2"}, TypeError, "scaling='2'"),
        ("no dimension", (torch.tensor(1.0), *good), {}, TypeError, "x must be a torch.Tensor [..., C], got one without"),
        ("scaling as a bool", (x, *good), {"scaling": True}, TypeError, "scaling=True"),
        ("backend as a list", (x, *good), {"backend": ["library"]}, ValueError, "backend=['library']"),
        ("unknown backend", (x, *good), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, *good), {"backend": "cpu"}, NotImplementedError, "no such backend"),
    ]


def _traffic(sample: Sample) -> int:
    x, weight = sample.args[:2]
    return inputs_and(x.shape[:-1].numel() * weight.shape[0], sample)


def _flops(sample: Sample) -> int:
    x, *matrices = sample.args[:4]
    return 2 * x.shape[:-1].numel() * sum(m.numel() for m in matrices)


def _drawn(choose: Choose) -> Sample:
    channels, out, rank = choose(CHANNELS), choose(CHANNELS), choose((4, 1, 8, 0))
    args = (randn(out, channels), randn(rank, channels, seed=1), randn(out, rank, seed=2))
    bias = (randn(out, seed=3),) if choose(YES_NO) else ()
    return Sample("drawn", (rows(choose, channels), *args, *bias), {"scaling": choose((1, 0.5, -2.0, 0))})


INFO = OpInfo(
    "lora_linear",
    lora_linear,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=_traffic,
    flops=_flops,
    products=True,
)
