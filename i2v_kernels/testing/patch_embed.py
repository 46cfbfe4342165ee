"""What tests and benches know of ``patch_embed``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import patch_embed
from .drawn import CHANNELS, FEW, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and, pixels, randn

INF, NAN = float("inf"), float("nan")
SIDE = 4  # of the patches of the first sample
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

GREY = (123, 117, 104)  # the pixel next to CLIP's mean


def _parameters(channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return randn(channels, 3, height, width) * (3 * height * width) ** -0.5, randn(channels, seed=1)


def _samples() -> list[Sample]:
    frames, (weight, bias) = pixels(2, 3, 8, 12), _parameters(10, SIDE, SIDE)
    wide = pixels(2, 6, 16, 24)
    grey = pixels(1, 2, 28, 28) % 2 + torch.tensor(GREY, dtype=torch.uint8, device="cpu")
    return [
        Sample("plain", (frames, weight, bias), CLIP),
        Sample("no bias", (frames, weight), CLIP),
        Sample("oblong patch", (frames, *_parameters(10, 2, 6)), CLIP),
        Sample("one patch", (frames, *_parameters(10, 8, 12)), CLIP),
        Sample("patches of 2", (frames, *_parameters(10, 2, 2)), CLIP),
        Sample("no normalisation", (frames, weight, bias), {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        Sample("other side of the range", (frames, weight, bias), {"mean": (1.0, 0.9, 0.1), "std": (0.5, 2.0, 0.1)}),
        Sample("a mean that no pixel has", (frames, weight), {"mean": (-0.3, 1.2, 0.5), "std": (0.5, 0.5, 0.5)}),
        Sample("crop of larger frames", (wide[:, :3, 5:13, 7:19], weight, bias), CLIP, telling=True),
        Sample("every other frame, row and pixel", (wide[:, ::2, ::2, ::2], weight, bias), CLIP),
        Sample("frames before clips", (pixels(3, 2, 8, 12).transpose(0, 1), weight, bias), CLIP),
        Sample("frames on their sides", (pixels(2, 3, 12, 8).transpose(2, 3), weight, bias), CLIP),
        Sample("channels-last weight", (frames, weight.contiguous(memory_format=torch.channels_last), bias), CLIP),
        Sample("C=150, patches of 14", (pixels(1, 2, 28, 42), *_parameters(150, 14, 14)), CLIP),
        Sample("patches of 16", (pixels(1, 2, 32, 48), *_parameters(70, 16, 16)), CLIP),
        # what would be far smaller than the sums it comes from, were pixels counted from 0
        Sample("grey", (grey, *_parameters(20, 14, 14)), CLIP),
        Sample("bright, of one sign", (pixels(1, 2, 32, 32) // 23 + 110, _parameters(10, 16, 16)[0].abs()), CLIP),
        Sample("one frame", (frames[:, :1], weight, bias), CLIP),
        Sample("no frames", (frames[:, :0], weight, bias), CLIP),
        Sample("no clips", (frames[:0], weight, bias), CLIP),
        Sample("no channels", (frames, weight[:0], bias[:0]), CLIP),
    ]


def _models(clips: int) -> list[Sample]:
    frames = pixels(clips, 8, 224, 224)
    return [
        Sample(f"ViT-{name} T=8", (frames, _parameters(channels, side, side)[0]), CLIP)
        for name, channels, side in (("B/16", 768, 16), ("L/14", 1024, 14), ("B/32", 768, 32))
    ]


def _bad() -> list[Any]:
    frames, (weight, bias) = pixels(2, 3, 8, 12), tuple(t.float() for t in _parameters(10, SIDE, SIDE))
    planes = frames.permute(0, 1, 4, 2, 3)
    return [
        ("a list", ([1], weight, bias), CLIP, TypeError, "frames must be a torch.Tensor [B, T, H, W, 3], got list"),
        ("normalised frames", (frames.float(), weight, bias), CLIP, TypeError, "frames.dtype=torch.float32"),
        ("signed bytes", (frames.to(torch.int8), weight, bias), CLIP, TypeError, "frames.dtype=torch.int8"),
        ("four dimensions", (frames[0], weight, bias), CLIP, ValueError, "frames.shape=(3, 8, 12, 3)"),
        ("channels first", (planes, weight, bias), CLIP, ValueError, "frames.shape=(2, 3, 3, 8, 12)"),
        ("channels apart", (planes.contiguous().permute(0, 1, 3, 4, 2), weight), CLIP, ValueError, "stride"),
        ("height in no patches", (frames[:, :, :7], weight, bias), CLIP, ValueError, "H=7 must be a positive multiple of the"),
        ("width in no patches", (frames[:, :, :, :10], weight), CLIP, ValueError, "W=10 must be a positive multiple of the"),
        ("no height", (frames[:, :, :0], weight, bias), CLIP, ValueError, "H=0 must be a positive"),
        ("weight of other channels", (frames, weight[:, :2]), CLIP, ValueError, "weight.shape=(10, 2, 4, 4)"),
        ("weight as a matrix", (frames, weight.flatten(1)), CLIP, ValueError, "weight.shape=(10, 48)"),
        ("weight of integers", (frames, weight.int()), CLIP, TypeError, "weight.dtype=torch.int32"),
        ("bias of another shape", (frames, weight, bias[:3]), CLIP, ValueError, "bias.shape=(3,)"),
        ("bias of another dtype", (frames, weight, bias.half()), CLIP, TypeError, "bias.dtype=torch.float16, but weight has"),
        ("mean of one number", (frames, weight), {"mean": 0.5, "std": (1, 1, 1)}, TypeError, "mean=0.5"),
        ("mean of four", (frames, weight), {"mean": (0, 0, 0, 0), "std": (1, 1, 1)}, TypeError, "mean=(0, 0, 0, 0)"),
        ("std as a tensor", (frames, weight), {"mean": (0, 0, 0), "std": torch.ones(3)}, TypeError, "std=tensor("),
        ("std of zero", (frames, weight), {"mean": (0, 0, 0), "std": (1, 0, 1)}, ValueError, "std=(1, 0, 1)"),
        ("an infinite mean", (frames, weight), {"std": (1, 1, 1), "mean": (0, INF, 0)}, ValueError, "mean=(0, inf, 0) must"),
        ("a mean that is none", (frames, weight), {"std": (1, 1, 1), "mean": (0, NAN, 0)}, ValueError, "mean=(0, nan, 0)"),
        ("an infinite std", (frames, weight), {"mean": (0, 0, 0), "std": (1, INF, 1)}, ValueError, "std=(1, inf, 1)"),
        ("a std that is none", (frames, weight), {"mean": (0, 0, 0), "std": (1, NAN, 1)}, ValueError, "std=(1, nan, 1)"),
        ("bools as means", (frames, weight), {"mean": (True, 0, 0), "std": (1, 1, 1)}, TypeError, "mean=(True, 0, 0)"),
        ("a patch of nothing", (frames, weight[:, :, :0]), CLIP, ValueError, "multiple of the patch's 0"),
        ("unknown backend", (frames, weight), {**CLIP, "backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (frames, weight), {**CLIP, "backend": "triton"}, NotImplementedError, "are on cpu"),
    ]


def _patches(frames: Tensor, count: int) -> Tensor:
    """Frames that are one patch wide."""
    return frames[:, :, :SIDE, :SIDE].repeat(1, 1, count, 1, 1)


def _rows(sample: Sample) -> int:
    frames, weight = sample.args[:2]
    return frames.numel() // weight[0].numel()


def _traffic(sample: Sample) -> int:
    return inputs_and(_rows(sample) * len(sample.args[1]), sample)


def _flops(sample: Sample) -> int:
    return 2 * _rows(sample) * sample.args[1].numel()


def _drawn(choose: Choose) -> Sample:
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


INFO = OpInfo(
    "patch_embed",
    patch_embed,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=_traffic,
    flops=_flops,
    dims="BTHWP -> BTNC",
    more=_patches,
)
