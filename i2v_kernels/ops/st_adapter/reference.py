"""The definition of ``st_adapter`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..temporal_conv import reference as temporal_conv


def adapter(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, conv_weight: Tensor, conv_bias: Tensor | None,
    up_weight: Tensor, up_bias: Tensor | None, height: int, width: int, prefix: int,
) -> Tensor:  # fmt: skip
    patches = x[:, :, prefix:]
    hidden = F.linear(patches, down_weight, down_bias)
    hidden = temporal_conv.forward(hidden, conv_weight, conv_bias, height, width, 0, "zero", 1, "", False)
    return torch.cat([x[:, :, :prefix], patches + F.linear(hidden, up_weight, up_bias)], dim=2)


def forward(x: Tensor, down_weight: Tensor, down_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The output and, if the last argument says so, the bottleneck of all tokens before the convolution."""
    kept = F.linear(x, down_weight, down_bias) if rest[-1] else x.new_empty(0)
    return adapter(x, down_weight, down_bias, *rest[:-1]), kept
