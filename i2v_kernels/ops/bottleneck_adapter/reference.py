"""The definition of ``bottleneck_adapter`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..activations import activate


def adapter(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, activation: str, scale: float, residual: bool,
) -> Tensor:  # fmt: skip
    rows = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = activate(F.linear(rows, down_weight, down_bias), activation)
    update = F.linear(hidden, up_weight, up_bias) * scale
    return x + update if residual else update


def forward(x: Tensor, down_weight: Tensor, down_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """The output and, if the last argument says so, the bottleneck before its activation."""
    norm_weight, norm_bias, eps, keep = *rest[2:5], rest[-1]
    rows = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    kept = F.linear(rows, down_weight, down_bias) if keep else x.new_empty(0)
    return adapter(x, down_weight, down_bias, *rest[:-1]), kept
