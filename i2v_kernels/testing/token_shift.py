"""What tests and benches know of ``token_shift``."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import token_shift
from .drawn import CHANNELS, FEW, FRAMES, YES_NO
from .opinfo import Choose, OpInfo, Sample, inputs_and_output, randn, sequence_first


def _samples() -> list[Sample]:
    x = randn(2, 8, 5, 24)
    tsm = [(3, -1), (3, 1)]
    return [
        Sample("tsm", (x, tsm)),
        Sample("edge", (x, tsm), {"padding": "edge"}),
        Sample("wrap", (x, tsm), {"padding": "wrap"}),
        Sample("class token", (x, tsm), {"tokens": (0, 1)}),
        Sample("patches, edge", (x, tsm), {"tokens": (1, 5), "padding": "edge"}),
        Sample("all channels", (x, [(12, -1), (12, 1)])),
        Sample("odd groups, far", (randn(2, 6, 3, 33), [(5, 2), (1, -3), (0, 4), (7, 9), (11, -9)]), {"padding": "edge"}),
        Sample("beyond 64 bits", (randn(2, 6, 3, 33), [(5, 2**63), (3, -(2**64) - 1)]), {"padding": "wrap"}),
        Sample("beyond 64 bits, edge", (randn(2, 6, 3, 33), [(5, 2**63), (3, -(2**70))]), {"padding": "edge"}),
        Sample("far, wrap", (randn(2, 6, 3, 33), [(5, 2), (1, -3), (7, 13)]), {"padding": "wrap"}),
        Sample("every third token", (randn(2, 5, 12, 24), tsm), {"tokens": (1, 12, 3), "padding": "edge"}),
        Sample("a step beyond the tokens", (x, tsm), {"tokens": (2, 5, 9)}),
        Sample("residual", (x, tsm), {"residual": True}, telling=True),
        Sample("residual, wrap", (x, tsm), {"residual": True, "padding": "wrap"}),
        Sample("residual, edge", (randn(2, 6, 3, 33), [(5, 2), (7, 9), (11, -9)]), {"residual": True, "padding": "edge"}),
        Sample("residual, edge, every other token", (x, tsm), {"residual": True, "padding": "edge", "tokens": (1, 5, 2)}),
        Sample("residual, sequence first", (sequence_first(x), tsm), {"residual": True, "tokens": (0, 1)}),
        Sample("no groups", (x, [])),
        Sample("sequence first", (sequence_first(x), tsm), telling=True),
        Sample("one frame", (x[:, :1], tsm), {"padding": "edge"}),
        Sample("no frames", (x[:, :0], tsm)),
        Sample("no tokens", (x[:, :, :0], tsm)),
        Sample("no clips", (x[:0], tsm)),
        Sample("no channels", (x[..., :0], [(0, 1)]), {"residual": True}),
    ]


def _models(clips: int) -> list[Sample]:
    return [
        Sample("TSM ViT-B/16 T=8", (randn(clips, 8, 197, 768), [(96, -1), (96, 1)])),
        Sample("ZeroI2V ViT-B/16 T=8", (randn(clips, 8, 197, 768), [(64, 1), (64, -1)]), {"padding": "edge"}),
        Sample("TSM ViT-B/16 T=8, residual", (randn(clips, 8, 197, 768), [(96, -1), (96, 1)]), {"residual": True}),
    ]


def _bad() -> list[Any]:
    x = torch.randn(2, 8, 5, 24)
    return [
        ("three dimensions", (x[0], [(3, 1)]), {}, ValueError, "x.shape=(8, 5, 24)"),
        ("integers", (x.int(), [(3, 1)]), {}, TypeError, "x.dtype=torch.int32"),
        ("too many channels", (x, [(20, 1), (5, 1)]), {}, ValueError, "name 25 channels"),
        ("negative channels", (x, [(-1, 1)]), {}, ValueError, "groups[0][0]=-1"),
        ("a half offset", (x, [(3, 0.5)]), {}, TypeError, "groups[0][1]=0.5"),
        ("no pair", (x, [3]), {}, TypeError, "groups[0]=3"),
        ("unknown padding", (x, [(3, 1)]), {"padding": "zero"}, ValueError, "padding='zero'"),
        ("tokens out of range", (x, [(3, 1)]), {"tokens": (0, 6)}, ValueError, "tokens[1]=6"),
        ("tokens that are no range", (x, [(3, 1)]), {"tokens": (0, 5, 1, 1)}, TypeError, "tokens=(0, 5, 1, 1)"),
        ("a step of none", (x, [(3, 1)]), {"tokens": (0, 5, 0)}, ValueError, "tokens[2]=0"),
        ("a residual that is no bool", (x, [(3, 1)]), {"residual": 1}, TypeError, "residual=1"),
        ("channels apart", (x.transpose(2, 3), [(3, 1)]), {}, ValueError, "stride"),
        ("groups as a number", (x, 3), {}, TypeError, "groups=3 must be a list of pairs"),
        ("groups as a string", (x, "ab"), {}, TypeError, "groups='ab'"),
        ("bool channels", (x, [(True, 1)]), {}, TypeError, "groups[0][0]=True"),
        ("padding as a number", (x, [(3, 1)]), {"padding": 0}, ValueError, "padding=0"),
        ("tokens as a number", (x, [(3, 1)]), {"tokens": 3}, TypeError, "tokens=3"),
        ("unknown backend", (x, [(3, 1)]), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, [(3, 1)]), {"backend": "cuda"}, NotImplementedError, "the tensor is on cpu"),
    ]


def _flops(sample: Sample) -> int:
    return sample.args[0].numel() if sample.kwargs.get("residual") else 0


def _drawn(choose: Choose) -> Sample:
    batch, frames, tokens, channels = choose(FEW), choose((*FRAMES, 0)), choose((2, 1, 5, 0)), choose(CHANNELS)
    groups, left = [], channels
    for _ in range(choose((2, 1, 3, 0))):
        count = choose((left // 3, 1, left, 0))
        count = min(count, left)
        groups.append((count, choose((1, -1, 0, 2, -3, 9, -(2**63), 2**64))))
        left -= count
    options = {"padding": choose(("zeros", "edge", "wrap")), "residual": choose(YES_NO)}
    if choose(YES_NO):
        start = choose(range(tokens + 1))
        options["tokens"] = (start, choose(range(start, tokens + 1)), choose((1, 2, 2**70)))
    return Sample("drawn", (randn(batch, frames, tokens, channels), groups), options)


INFO = OpInfo(
    "token_shift",
    token_shift,
    samples=_samples,
    models=_models,
    bad=_bad,
    drawn=_drawn,
    traffic=inputs_and_output,
    flops=_flops,
    exact=True,
    autocasts=False,
)
