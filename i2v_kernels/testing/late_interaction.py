"""What tests and benches know of ``late_interaction``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import late_interaction
from .drawn import FEW, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and, randn


def _features(a: int, t: int, v: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    return randn(a, t, d, seed=1), randn(v, n, d, seed=2)


def _weights(a: int, t: int, v: int, n: int) -> dict[str, Tensor]:
    return {"text_weight": randn(a, t, seed=3), "video_weight": randn(v, n, seed=4)}


def _valid(items: int, tokens: int, *, seed: int = 0) -> Tensor:
    """About two thirds of the tokens, of the last item none."""
    valid = torch.randn(items, tokens, generator=torch.Generator().manual_seed(seed)) > -0.4
    valid[-1:] = False
    return valid


def _samples() -> list[Sample]:
    text, video = _features(5, 7, 6, 5, 16)  # pairs enough for the error to be no matter of luck
    masks = {"text_mask": _valid(5, 7), "video_mask": _valid(6, 5)}
    weights = _weights(5, 7, 6, 5)
    whole = torch.randint(-2, 3, (6, 6, 8), generator=torch.Generator().manual_seed(0)).double() * 16  # many products are equal
    nan_video, inf_text = video.clone(), text.clone()
    nan_video[1, 2, 3] = float("nan")
    inf_text[0, 1, 2] = float("inf")
    behind = {**masks, "video_mask": masks["video_mask"].clone()}
    behind["video_mask"][1, 2] = False
    strided = torch.zeros(7, 5, 19, dtype=torch.float64)[..., 1:-2].copy_(text.transpose(0, 1)).transpose(0, 1)
    soft = {"mode": "softmax", "temperature": 0.5}
    return [
        Sample("plain", (text, video)),
        Sample("weights and masks", (text, video), {**weights, **masks}, telling=True),
        Sample("weights", (text, video), weights),
        Sample("one weight", (text, video), {"video_weight": weights["video_weight"], **masks}),
        Sample("means over valid tokens", (text, video), {"mode": "ti", **masks}),
        Sample("maxsim", (text, video), {"mode": "maxsim", **masks}, telling=True),
        Sample("maxsim, weights", (text, video), {"mode": "maxsim", "text_weight": weights["text_weight"]}),
        Sample("masked similarities are 0", (text, video), {**weights, **masks, "masked": "zero"}, telling=True),
        Sample("maxsim, masked are 0", (text, video), {"mode": "maxsim", **masks, "masked": "zero"}),
        Sample("softmax", (text, video), {**soft, **weights, **masks}, telling=True),
        Sample("softmax of unit similarities", (text, video), {**soft, "unit": True, **masks}),
        Sample("softmax, masked are 0", (text, video), {**soft, "masked": "zero", **masks}),
        Sample("softmax, sharp", (text, video), {"mode": "softmax", "temperature": 0.01, "normalize": True}),
        Sample("cosines", (text, video), {"normalize": True, **weights}),
        Sample("equal similarities", (whole, whole[:4, :4] * 2)),
        Sample("tokens first in memory", (strided, video), masks),
        Sample("a tile and a bit", _features(5, 33, 9, 17, 24)),
        Sample("77 and 49 tokens, D64", _features(2, 77, 3, 49, 64), {"text_mask": _valid(2, 77)}),
        Sample("sentences and frames", _features(9, 1, 5, 12, 40), {"video_mask": _valid(5, 12)}),
        Sample("sentences and videos", _features(5, 1, 6, 1, 20)),
        Sample("long videos", _features(2, 5, 2, 300, 16), {"video_mask": _valid(2, 300)}),
        Sample("long texts", _features(2, 260, 3, 4, 16)),
        Sample("both long", _features(1, 140, 2, 150, 16), {"text_mask": _valid(3, 140)[:1]}),
        Sample("many videos", _features(2, 3, 40, 12, 8)),
        Sample("D1", _features(2, 3, 4, 5, 1)),
        Sample("D300", _features(2, 3, 4, 5, 300)),
        Sample("no texts", _features(0, 7, 6, 5, 16)),
        Sample("no videos", _features(5, 7, 0, 5, 16), {"text_mask": masks["text_mask"]}),
        Sample("no tokens of texts", _features(3, 0, 4, 5, 16)),
        Sample("no tokens of videos", _features(3, 7, 4, 0, 16), {"mode": "maxsim"}),
        Sample("no channels", _features(5, 7, 6, 5, 0), masks),
        Sample("nan in a video", (text, nan_video), weights),
        Sample("nan in a token that is not valid", (text, nan_video), {**weights, **behind}),
        Sample("inf in a text", (inf_text, video)),
    ]


def _models(clips: int) -> list[Sample]:
    """For each clip 32 texts and videos, of at most 16 clips: published formulations store each similarity."""
    n = 32 * min(clips, 16)
    drl, patches = _features(n, 32, n, 12, 512), _features(n, 32, n, 49, 512)
    return [
        Sample("DRL WTI, 32 x 12 tokens", drl, _weights(n, 32, n, 12)),
        Sample("DRL WTI, 32 x 49 tokens", patches, _weights(n, 32, n, 49)),
        Sample("FILIP TI, 32 x 12 tokens", drl, {"mode": "ti"}),
        Sample("maxsim, 32 x 49 tokens", patches, {"mode": "maxsim"}),
        Sample("X-CLIP softmax, 32 x 12 tokens", drl, {"mode": "softmax", "temperature": 0.01, "normalize": True}),
    ]


def _bad() -> list[Any]:
    text, video = torch.randn(3, 7, 16), torch.randn(4, 5, 16)
    yes, weight = torch.ones(3, 7).bool(), torch.ones(3, 7)
    return [
        ("a list", ([1], video), {}, TypeError, "text must be a torch.Tensor"),
        ("sentences without tokens", (text[:, 0], video), {}, ValueError, "text.shape=(3, 16), but [A, Nt, D]"),
        ("videos without tokens", (text, video[:, 0]), {}, ValueError, "video.shape=(4, 16), but [V, Nv, D]"),
        ("other channels", (text, video[..., :8]), {}, ValueError, "video.shape=(4, 5, 8)"),
        ("integers", (text.int(), video.int()), {}, TypeError, "text.dtype=torch.int32"),
        ("another dtype", (text, video.half()), {}, TypeError, "video.dtype=torch.float16"),
        ("strided channels", (torch.randn(3, 16, 7).transpose(1, 2), video), {}, ValueError, "text.stride()=(112, 1, 7)"),
        ("a sparse text", (text.to_sparse(), video), {}, TypeError, "text.layout=torch.sparse_coo"),
        ("another device", (text, video.to("meta")), {}, ValueError, "video is on meta"),
        ("float mask", (text, video), {"text_mask": weight}, TypeError, "text_mask must be a bool tensor [A, Nt]"),
        ("mask of texts for videos", (text, video), {"video_mask": yes}, ValueError, "video_mask.shape=(3, 7)"),
        ("weights of texts for videos", (text, video), {"video_weight": weight}, ValueError, "video_weight.shape=(3, 7)"),
        ("weights of integers", (text, video), {"text_weight": weight.int()}, TypeError, "text_weight.dtype=torch.int32"),
        ("weights of means", (text, video), {"mode": "ti", "text_weight": weight}, ValueError, "mode='ti' takes none"),
        (
            "weights of what maxsim does not sum", (text, video), {"mode": "maxsim", "video_weight": torch.ones(4, 5)},
            ValueError, "video_weight of shape (4, 5) is given, but mode='maxsim' takes none",
        ),
        ("unknown mode", (text, video), {"mode": "xti"}, ValueError, "mode='xti' is not one of 'wti', 'ti'"),
        ("unknown way to mask", (text, video), {"masked": "drop"}, ValueError, "masked='drop' is not one of"),
        ("no temperature", (text, video), {"mode": "softmax"}, TypeError, "temperature=None must be a number"),
        ("temperature 0", (text, video), {"mode": "softmax", "temperature": 0}, ValueError, "temperature=0.0 must be above 0"),
        ("temperature of maxima", (text, video), {"temperature": 0.1}, ValueError, "temperature=0.1 is of mode=\"softmax\""),
        ("unit maxima", (text, video), {"unit": True}, ValueError, "unit=True is of mode=\"softmax\""),
        ("unit as a string", (text, video), {"unit": "yes"}, TypeError, "unit='yes' must be a bool"),
        ("normalize as a number", (text, video), {"normalize": 1}, TypeError, "normalize=1 must be a bool"),
        ("unknown backend", (text, video), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that it has not", (text, video), {"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run"),
    ]  # fmt: skip


def _flops(sample: Sample) -> int:
    text, video = sample.args
    return 2 * text.numel() * video.shape[0] * video.shape[1]


def _drawn(choose: Choose) -> Sample:
    texts, rows, videos, columns = choose(FEW), choose((3, 1, 8, 0, 33)), choose((2, 1, 5, 0, 40)), choose((4, 1, 12, 0, 49))
    text, video = _features(texts, rows, videos, columns, choose((8, 1, 16, 20, 64, 0)))
    options: dict[str, Any] = {"mode": choose(("wti", "ti", "maxsim", "softmax")), "masked": choose(("ignore", "zero"))}
    if options["mode"] == "softmax":
        options |= {"temperature": choose((0.5, 0.05, 4)), "unit": choose(YES_NO)}
    for name, shape, taken in (
        ("text", text.shape[:2], options["mode"] != "ti"),
        ("video", video.shape[:2], options["mode"] in ("wti", "softmax")),
    ):
        if choose(YES_NO):
            options[f"{name}_mask"] = _valid(*shape, seed=choose(range(4)))
        if taken and choose(YES_NO):
            options[f"{name}_weight"] = randn(*shape, seed=choose(range(4)))
    return Sample("drawn", (text, video), options)


INFO = OpInfo(
    "late_interaction",
    late_interaction,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=lambda sample: inputs_and(0, sample) + 4 * sample.args[0].shape[0] * sample.args[1].shape[0],
    flops=_flops,
    dims="ATD, VSD -> AV",
    rows="AV",
    wide=True,
    products=True,
    spreads=True,
    picks=True,
)
