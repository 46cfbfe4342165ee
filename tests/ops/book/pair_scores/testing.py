"""What tests and benches know of ``pair_scores``."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import pair_scores
from .drawn import CHANNELS, FEW
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn


def _samples() -> list[Sample]:
    return [
        Sample("plain", (randn(4, 5, 16), randn(3, 8, 16))),
        Sample("slices", (randn(4, 5, 32)[:, :, 3:19], randn(6, 8, 16)[::2]), telling=True),
        Sample("one", (randn(1, 5, 16), randn(1, 8, 16))),
        Sample("no words", (randn(4, 0, 16), randn(3, 8, 16))),
        Sample("no videos", (randn(4, 5, 16), randn(0, 8, 16))),
    ]


def _models(clips: int) -> list[Sample]:
    return [Sample("ViT-B/16", (randn(clips, 32, 512) * 0.2, randn(clips, 12, 512) * 0.2))]


def _bad() -> list[Any]:
    x = torch.randn(4, 5, 16)
    return [
        ("two dimensions", (x[0], x), {}, ValueError, "text.shape=(5, 16)"),
        ("another width", (x, x[..., :8]), {}, ValueError, "video.shape=(4, 5, 8)"),
        ("no frame", (x, x[:, :0]), {}, ValueError, "video.shape=(4, 0, 16), but at least one frame"),
    ]


def _drawn(choose: Choose) -> Sample:
    width = choose(CHANNELS)
    return Sample("drawn", (randn(choose(FEW), choose(FEW), width), randn(choose(FEW), choose((3, 1, 8)), width)))


def _traffic(sample: Sample) -> int:
    text, video = sample.args
    return inputs_and(len(text) * len(video), sample)


def _flops(sample: Sample) -> int:
    text, video = sample.args
    return 2 * text.numel() * video.shape[:2].numel()


INFO = OpInfo(
    "pair_scores",
    pair_scores,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=_traffic,
    flops=_flops,
    dims="AWD, VFD -> AV",
    rows="AV",
    products=True,
)
