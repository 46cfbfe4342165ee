"""The definition of ``text_conditioned_pool`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is not None:
        video_k, video_v = (x.masked_fill(~mask[:, :, None], 0) for x in (video_k, video_v))
    scores = torch.einsum("ad,vfd->vaf", text, video_k) * scale
    if mask is not None:
        # of a video without a valid frame all are looked at, which are zeros
        scores = scores.masked_fill((mask.any(1, keepdim=True) & ~mask)[:, None], float("-inf"))
    return torch.einsum("vaf,vfe->vae", scores.softmax(-1), video_v)
