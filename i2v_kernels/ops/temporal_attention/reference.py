"""The definition of ``temporal_attention`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpacked


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    q, k, v = unpacked(q, k, v)
    frames = q.shape[1]
    scores = torch.einsum("btnhd,bsnhd->bnhts", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    valid = torch.ones(frames, frames, dtype=torch.bool, device=q.device)
    if causal:
        valid = valid.tril()
    if mask is not None:
        valid = valid & mask[:, None, None, None, :]
    probs = scores.masked_fill(~valid, float("-inf")).softmax(-1)
    probs = probs.masked_fill(~valid.any(-1, keepdim=True), 0.0)  # no frame to attend to: zeros, not NaN
    return torch.einsum("bnhts,bsnhd->btnhd", probs, v)
