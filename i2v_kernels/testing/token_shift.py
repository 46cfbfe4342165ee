"""What tests and benches know of ``token_shift``."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import token_shift
from .opinfo import OpInfo, Sample, inputs_and_output, randn, sequence_first


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
        Sample("far, wrap", (randn(2, 6, 3, 33), [(5, 2), (1, -3), (7, 13)]), {"padding": "wrap"}),
        Sample("no groups", (x, [])),
        Sample("sequence first", (sequence_first(x), tsm)),
        Sample("residual", (x, tsm), {"residual": True}),
        Sample("residual, edge, every second token", (x, tsm), {"residual": True, "padding": "edge", "tokens": (1, 5, 2)}),
        Sample("residual, wrap", (sequence_first(x), [(5, 3), (7, -2)]), {"residual": True, "padding": "wrap"}),
        Sample("every third token", (x, [(24, 1)]), {"padding": "edge", "tokens": (1, 5, 3)}),
        Sample("one frame", (x[:, :1], tsm), {"padding": "edge"}),
        Sample("no frames", (x[:, :0], tsm)),
        Sample("no tokens", (x[:, :, :0], tsm)),
        Sample("no clips", (x[:0], tsm)),
    ]


def _models(clips: int) -> list[Sample]:
    return [
        Sample("TSM ViT-B/16 T=8", (randn(clips, 8, 197, 768), [(96, -1), (96, 1)])),
        Sample("ZeroI2V ViT-B/16 T=8", (randn(clips, 8, 197, 768), [(64, 1), (64, -1)]), {"padding": "edge"}),
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
        ("tokens by no step", (x, [(3, 1)]), {"tokens": (0, 5, 0)}, ValueError, "tokens[2]=0"),
        ("four numbers for tokens", (x, [(3, 1)]), {"tokens": (0, 5, 1, 2)}, TypeError, "tokens=(0, 5, 1, 2)"),
        ("residual as a number", (x, [(3, 1)]), {"residual": 1}, TypeError, "residual=1"),
        ("tokens out of range", (x, [(3, 1)]), {"tokens": (0, 6)}, ValueError, "tokens[1]=6"),
        ("channels apart", (x.transpose(2, 3), [(3, 1)]), {}, ValueError, "stride"),
        ("unknown backend", (x, [(3, 1)]), {"backend": "magic"}, ValueError, "backend='magic'"),
        ("backend that cannot", (x, [(3, 1)]), {"backend": "cuda"}, NotImplementedError, "the tensor is on cpu"),
    ]


INFO = OpInfo("token_shift", token_shift, _samples, _models, _bad, inputs_and_output, lambda sample: 0, exact=True)
