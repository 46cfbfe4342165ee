"""The definition of ``patch_embed`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import accumulate_dtype


def forward(frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> Tensor:
    pixels = frames.flatten(0, 1).to(accumulate_dtype(weight.dtype)) / 255
    images = torch.stack([(pixels[..., c] - mean[c]) / std[c] for c in range(3)], dim=1).to(weight.dtype)
    if len(weight) == 0:  # conv2d refuses what has no channel to give
        tokens = (frames.shape[2] // weight.shape[2]) * (frames.shape[3] // weight.shape[3])
        return (weight.sum() + (0 if bias is None else bias.sum())) * weight.new_empty(*frames.shape[:2], tokens, 0)
    grid = F.conv2d(images, weight, bias, stride=weight.shape[2:])  # [B*T, C, H/ph, W/pw]
    return grid.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])
