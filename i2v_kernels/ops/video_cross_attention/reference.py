"""The definition of ``video_cross_attention`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import accumulate_dtype


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bqhd,btnhd->bhqtn", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :, None], float("-inf"))
    scores = scores.flatten(3)  # [B, H, Q, T * N]
    probs = scores.softmax(-1)
    if mask is not None:
        probs = probs.masked_fill(~mask.any(1)[:, None, None, None], 0.0)  # no frame to attend to: zeros, not NaN
    out = torch.einsum("bhqtn,btnhd->bqhd", probs.unflatten(3, k.shape[1:3]), v)
    lse = scores.detach().to(accumulate_dtype(q.dtype)).logsumexp(-1).transpose(1, 2)
    return out, torch.stack([lse, torch.ones_like(lse)], -1)
