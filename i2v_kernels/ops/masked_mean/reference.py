"""The definition of ``masked_mean`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..base import accumulate_dtype

EPS = 1e-12  # of F.normalize


def forward(x: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    frames = x.to(accumulate_dtype(x.dtype))
    if mask is not None:
        frames = frames.masked_fill(~mask[:, :, None], 0)
    if normalize:
        frames = F.normalize(frames, dim=-1, eps=EPS)
    mean = frames.sum(1) / (max(x.shape[1], 1) if mask is None else mask.sum(1, keepdim=True).clamp(min=1))
    return (F.normalize(mean, dim=-1, eps=EPS) if normalize else mean).to(x.dtype)
