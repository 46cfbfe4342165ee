"""What tests and benches know of ``masked_mean``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import masked_mean
from .drawn import CHANNELS, FEW, FRAMES, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn


def _mask(batch: int, frames: int, seed: int = 0) -> Tensor:
    """Valid frames come first, as where clips are padded; the last clip has none."""
    lengths = torch.randint(1, frames + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    lengths[-1] = 0
    return torch.arange(frames) < lengths


def _samples() -> list[Sample]:
    x, mask = randn(3, 12, 24), _mask(3, 12)
    unit = {"normalize": True}
    holes = torch.tensor([[True, False, True, True, False] * 2 + [True, False]] * 3)
    nan, inf = x.clone(), x.clone()
    nan[0, 1, 3] = nan[1, 11] = float("nan")
    inf[1, 2, 5] = float("inf")
    return [
        Sample("plain", (x,)),
        Sample("normalised", (x,), unit, telling=True),
        Sample("mask with an empty clip", (x, mask)),
        Sample("mask, normalised", (x, mask), unit, telling=True),
        Sample("holes", (x, holes), unit),
        Sample("frames first", (x.transpose(0, 1).contiguous().transpose(0, 1), holes), unit),
        Sample("slices of a wider tensor", (randn(3, 12, 64)[:, :, 8:41], mask), unit),
        Sample("512 channels", (randn(2, 12, 512), _mask(2, 12, 1)), unit),
        Sample("1100 channels", (randn(2, 5, 1100),)),
        Sample("many frames", (randn(1, 530, 40), _mask(2, 530, 2)[:1]), unit),
        Sample("one frame", (x[:, :1],), unit),
        Sample("one channel", (x[:, :, :1], mask)),
        Sample("one of each", (x[:1, :1, :1], mask[:1, :1])),
        Sample("no frames", (x[:, :0],), unit),
        Sample("no frames, masked", (x[:, :0], mask[:, :0])),
        Sample("no channels", (x[:, :, :0], mask), unit),
        Sample("no clips", (x[:0],)),
        Sample("nan, some where it does not matter", (nan, holes), unit),
        Sample("inf", (inf, holes)),
        Sample("large", (x * 100, mask), unit),
    ]


def _models(clips: int) -> list[Sample]:
    return [
        Sample("CLIP4Clip, ViT-B/16 T=12", (randn(64 * clips, 12, 512),), {"normalize": True}),
        Sample("ViT-B/16 T=12", (randn(64 * clips, 12, 512),)),
        Sample("CLIP4Clip, ViT-L/14 T=12", (randn(64 * clips, 12, 768),), {"normalize": True}),
    ]


def _bad() -> list[Any]:
    x = torch.randn(2, 8, 24)
    return [
        ("a list", ([1],), {}, TypeError, "x must be a torch.Tensor"),
        ("two dimensions", (x[0],), {}, ValueError, "x.shape=(8, 24), but [B, T, C] is needed"),
        ("tokens", (x[None],), {}, ValueError, "x.shape=(1, 2, 8, 24)"),
        ("integers", (x.int(),), {}, TypeError, "x.dtype=torch.int32"),
        ("strided channels", (x.transpose(1, 2),), {}, ValueError, "the last dimension must have stride 1"),
        ("a sparse x", (x.to_sparse(),), {}, TypeError, "x.layout=torch.sparse_coo"),
        ("float mask", (x, torch.ones(2, 8)), {}, TypeError, "mask must be a bool tensor [B, T]"),
        ("mask of another shape", (x, torch.ones(2, 7).bool()), {}, ValueError, "mask.shape=(2, 7)"),
        ("mask elsewhere", (x, torch.ones(2, 8, device="meta").bool()), {}, ValueError, "mask is on meta"),
        ("normalize as a number", (x,), {"normalize": 1}, TypeError, "normalize=1 must be a bool"),
        ("unknown backend", (x,), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that it has not", (x,), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run"),
    ]


def _drawn(choose: Choose) -> Sample:
    x = randn(choose(FEW), choose((*FRAMES, 0)), choose((*CHANNELS, 130)))
    args: tuple[Tensor, ...] = (x,)
    if choose(YES_NO):
        args = (x, randn(*x.shape[:2], seed=choose(range(4))) > choose((-0.5, 0.5, 5.0)))
    # of one channel the mean is one of signs, perhaps of as many of either
    return Sample("drawn", args, {"normalize": choose(YES_NO) and x.shape[2] != 1})


def _traffic(sample: Sample) -> int:
    x = sample.args[0]
    return inputs_and(x.shape[0] * x.shape[2], sample)


def _flops(sample: Sample) -> int:
    """An addition for each element; of a normalised one its square and a product besides."""
    return sample.args[0].numel() * (5 if sample.kwargs.get("normalize") else 1)


INFO = OpInfo(
    "masked_mean",
    masked_mean,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=_traffic,
    flops=_flops,
    dims="BTC -> BC",
    rows="B",
    autocasts=False,
)
