"""What tests and benches know of ``text_conditioned_similarity``: the calls of ``text_conditioned_pool``, with targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..ops import text_conditioned_similarity
from . import text_conditioned_pool as pool
from .drawn import CHANNELS
from .opinfo import OpInfo, Sample, randn


def _with_target(sample: Sample) -> Sample:
    text, _, v = sample.args
    return replace(sample, args=(*sample.args, randn(text.shape[0], v.shape[2], seed=5)))


def _samples() -> list[Sample]:
    # the error of a single number is a matter of luck
    found = [_with_target(sample) for sample in pool.samples() if sample.name != "one of each"]
    text, k, v, target = found[0].args
    nan = target.clone()
    nan[1, 2] = float("nan")
    return [
        *found,
        Sample("nan in a target", (text, k, v, nan)),
        Sample("large vectors", (text, k, v * 1000, target * 100)),
        Sample("small vectors", (text, k, v * 0.01, target * 0.01)),
    ]


def _bad() -> list[Any]:
    found = []
    for why, args, *rest in pool.bad():
        text, _, v = args
        target = text.new_zeros(7, 24) if why != "a list" and text.dim() == 2 else v[0]
        found.append((why, (*args, target), *rest))
    (text, k, v), target = pool.bad()[0][1], found[1][1][0].float()
    text = target
    return [
        *found,
        ("no target", (text, k, v, None), {}, TypeError, "target must be a torch.Tensor [A, E]"),
        ("targets of other texts", (text, k, v, target[:3]), {}, ValueError, "target.shape=(3, 24)"),
        ("targets of another width", (text, k, v, target[:, :8]), {}, ValueError, "target.shape=(7, 8)"),
    ]


def _traffic(sample: Sample) -> int:
    """Inputs, and an output that is never narrower than float32."""
    text, k, _, _ = sample.args
    size = max(text.element_size(), 4)
    return sum(x.numel() * x.element_size() for x in sample.inputs()) + text.shape[0] * k.shape[0] * size


def _flops(sample: Sample) -> int:
    """Products of texts and frames twice, of videos' frames with each other, and of these with probabilities."""
    text, _, v, _ = sample.args
    (texts, dim), (videos, frames, width) = text.shape, v.shape
    return 2 * videos * frames * (texts * (dim + width + frames) + frames * width)


INFO = OpInfo(
    "text_conditioned_similarity",
    text_conditioned_similarity,
    samples=_samples,
    models=lambda clips: [_with_target(sample) for sample in pool.models(clips)],
    bad=_bad,
    # cosines of one channel are signs, whose gradient is none
    drawn=lambda choose: _with_target(pool.drawn(choose, tuple(width for width in CHANNELS if width != 1))),
    traffic=_traffic,
    flops=_flops,
    dims="AD, VFD, VFE, AE -> AV",
    rows="AV",
    wide=True,
    products=True,
)
