"""What tests and benches know of ``text_conditioned_pool``, without a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import text_conditioned_pool
from .drawn import CHANNELS, FEW, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn

Call = tuple[tuple[Tensor, ...], dict[str, Any]]


def call(a: int, v: int, f: int, d: int, e: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return randn(a, d, seed=1), randn(v, f, d, seed=2), randn(v, f, d if e is None else e, seed=3)


def mask_of(videos: int, frames: int) -> Tensor:
    """All frames of the first video, fewer of the next ones and not their first one, none of the last."""
    lengths = torch.arange(videos, 0, -1)[:, None] * frames // max(videos, 1)
    mask = torch.arange(frames) < lengths
    mask[1:, :1] = False
    mask[-1:] = False
    return mask


def samples() -> list[Sample]:
    """Without targets."""
    text, k, v = call(7, 5, 6, 24)
    mask = mask_of(5, 6)
    packed = randn(5, 6, 2, 24, seed=4)
    nan_text, nan_k, nan_v, inf_k = text.clone(), k.clone(), v.clone(), k.clone()
    nan_text[2, 5] = nan_k[1, 2, 3] = nan_v[4, 1, 7] = float("nan")
    inf_k[0, 3, 1] = float("inf")
    return [
        Sample("plain", (text, k, v)),
        Sample("mask with an empty video", (text, k, v), {"mask": mask}, telling=True),
        Sample("scale", (text, k, v), {"scale": -0.7, "mask": mask}),
        Sample("no scale", (text, k, v), {"scale": 0}),
        Sample("values of another width", call(4, 3, 8, 16, 40)),
        Sample("packed keys and values", (text, packed[:, :, 0], packed[:, :, 1]), {"mask": mask}, telling=True),
        Sample("frames first", (text, *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)))),
        Sample("every other text", (randn(14, 30, seed=1)[::2, 3:27], k, v)),
        Sample("one frame", call(7, 5, 1, 24)),
        Sample("one text", call(1, 5, 6, 24)),
        Sample("one video", call(7, 1, 6, 24)),
        Sample("one of each", call(1, 1, 1, 1, 16)),
        Sample("12 frames of 64", call(33, 9, 12, 64)),
        Sample("20 frames", call(19, 3, 20, 72)),
        Sample("no texts", call(0, 5, 6, 24)),
        Sample("no videos", (text, k[:0], v[:0]), {"mask": mask[:0]}),
        Sample("no channels", call(7, 5, 6, 0)),
        Sample("no values", (text, k, v[:, :, :0])),
        Sample("nan in a text", (nan_text, k, v)),
        Sample("nan in a key", (text, nan_k, v)),
        Sample("nan in a frame that is not valid", (text, nan_k, nan_v), {"mask": mask}),
        Sample("inf in a key", (text, inf_k, v)),
        Sample("large scores", (text * 4, k * 4, v)),
    ]


def models(clips: int) -> list[Sample]:
    """As many texts as videos: 64 for each clip of other ops' calls."""
    return [Sample("X-Pool, ViT-B/32 T=12", call(64 * clips, 64 * clips, 12, 512))]


def bad() -> list[Any]:
    text, k, v = (x.float() for x in call(7, 5, 6, 24))
    return [
        ("a list", ([1], k, v), {}, TypeError, "text must be a torch.Tensor [A, D]"),
        ("integers", (text.int(), k, v), {}, TypeError, "text.dtype=torch.int32"),
        ("texts with tokens", (k, k, v), {}, ValueError, "text.shape=(5, 6, 24), but [A, D]"),
        ("videos without frames", (text, text, v), {}, ValueError, "video_k.shape=(7, 24), but [V, F, D]"),
        ("no frame", (text, k[:, :0], v[:, :0]), {}, ValueError, "video_k.shape=(5, 0, 24), but at least one frame"),
        ("keys of another width", (text, k[:, :, :8], v), {}, ValueError, "video_k.shape=(5, 6, 8)"),
        ("values of other videos", (text, k, v[:3]), {}, ValueError, "video_v.shape=(3, 6, 24)"),
        ("values of other frames", (text, k, v[:, :3]), {}, ValueError, "video_v.shape=(5, 3, 24)"),
        ("another dtype", (text, k.half(), v), {}, TypeError, "video_k.dtype=torch.float16"),
        ("strided channels", (text, k.mT.contiguous().mT, v), {}, ValueError, "the last dimension must have stride 1"),
        ("float mask", (text, k, v), {"mask": torch.ones(5, 6)}, TypeError, "mask must be a bool tensor [V, F]"),
        ("mask of another shape", (text, k, v), {"mask": torch.ones(5, 7).bool()}, ValueError, "mask.shape=(5, 7)"),
        ("scale as a string", (text, k, v), {"scale": "big"}, TypeError, "scale='big'"),
        ("unknown backend", (text, k, v), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that it has not", (text, k, v), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run"),
    ]


def drawn(choose: Choose, widths: tuple[int, ...] = CHANNELS) -> Sample:
    texts, videos, frames, dim = choose((*FEW, 9)), choose((*FEW, 5)), choose((3, 1, 2, 12, 17)), choose(CHANNELS)
    options: dict[str, Any] = {"scale": choose((None, 0.3, -1.0, 0))}
    if choose(YES_NO):
        options["mask"] = randn(videos, frames, seed=choose(range(4))) > choose((-0.5, 0.5, 5.0))
    return Sample("drawn", call(texts, videos, frames, dim, choose(widths)), options)


def _traffic(sample: Sample) -> int:
    text, _, v = sample.args
    return inputs_and(text.shape[0] * v.shape[0] * v.shape[2], sample)


def _flops(sample: Sample) -> int:
    text, k, v = sample.args
    return 2 * text.shape[0] * k.shape[0] * k.shape[1] * (k.shape[2] + v.shape[2])


INFO = OpInfo(
    "text_conditioned_pool",
    text_conditioned_pool,
    samples=samples,
    models=models,
    bad=bad,
    drawn=drawn,
    traffic=_traffic,
    flops=_flops,
    dims="AD, VFD, VFE -> VAE",
    rows="VA",
    products=True,
)
