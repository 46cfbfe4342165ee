"""What tests and benches know of ``frame_pool``."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import frame_pool
from .drawn import CHANNELS, FEW, FRAMES
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn, sequence_first


def _samples() -> list[Sample]:
    x = randn(2, 8, 5, 24)
    return [
        Sample("plain", (x,)),
        Sample("sequence first", (sequence_first(x),), telling=True),
        Sample("one frame", (x[:, :1],)),
        Sample("no tokens", (x[:, :, :0],)),
        Sample("no clips", (x[:0],)),
    ]


def _models(clips: int) -> list[Sample]:
    return [Sample("ViT-B/16 T=8", (randn(clips, 8, 197, 768),))]


def _bad() -> list[Any]:
    x = torch.randn(2, 8, 5, 24)
    return [
        ("three dimensions", (x[0],), {}, ValueError, "x.shape=(8, 5, 24)"),
        ("no frame", (x[:, :0],), {}, ValueError, "x.shape=(2, 0, 5, 24), but at least one frame"),
        ("integers", (x.int(),), {}, TypeError, "x.dtype=torch.int32"),
        ("unknown backend", (x,), {"backend": "magic"}, ValueError, "backend='magic'"),
    ]


def _drawn(choose: Choose) -> Sample:
    return Sample("drawn", (randn(choose(FEW), choose(FRAMES), choose(FEW), choose(CHANNELS)),))


def _traffic(sample: Sample) -> int:
    x = sample.args[0]
    return inputs_and(x.numel() // x.shape[1], sample)


INFO = OpInfo(
    "frame_pool",
    frame_pool,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=_traffic,
    flops=lambda sample: sample.args[0].numel(),
    dims="BTNC -> BNC",
    autocasts=False,
)
