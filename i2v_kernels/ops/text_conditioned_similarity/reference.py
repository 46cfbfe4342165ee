"""The definition of ``text_conditioned_similarity`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..base import accumulate_dtype

EPS = 1e-12  # a vector that is shorter is zero


def forward(text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from ..text_conditioned_pool import reference

    pooled = reference.forward(text, video_k, video_v, mask, scale).to(accumulate_dtype(text.dtype))
    wide = target.to(pooled.dtype)
    product = torch.einsum("ae,vae->av", wide, pooled)
    return product * over_length(wide.square().sum(-1))[:, None] * over_length(pooled.square().sum(-1)).t()


def over_length(squares: Tensor) -> Tensor:
    """One over the root of squared lengths, 0 for those of zeros."""
    return squares.masked_fill(squares <= EPS**2, math.inf).rsqrt()
