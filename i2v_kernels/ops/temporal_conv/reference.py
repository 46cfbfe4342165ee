"""The definition of ``temporal_conv`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, prefix_mode: str,
    dilation: int, activation: str, residual: bool,
) -> Tensor:  # fmt: skip
    batch, frames, tokens, channels = x.shape
    patches = x[:, :, prefix:].reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
    steps = (dilation, 1, 1)
    padding = [step * (size // 2) for step, size in zip(steps, weight.shape[2:])]
    if x.is_cpu and x.dtype is torch.bfloat16 and any(n < k for n, k in zip(patches.shape[2:], weight.shape[2:])):
        patches = patches.contiguous()  # in channels_last PyTorch's gradient of such a weight is wrong (seen in 2.11 and 2.14)
    if patches.numel() > 0:
        out = F.conv3d(patches, weight, bias, padding=padding, dilation=steps, groups=channels)
    else:  # conv3d refuses what has no frame or no patch
        out = patches + 0 * weight.sum() + (0 if bias is None else 0 * bias.sum())
    out = activate(out.permute(0, 2, 3, 4, 1).reshape(batch, frames, tokens - prefix, channels), activation)
    if residual:
        out = x[:, :, prefix:] + out
    if prefix == 0:
        return out
    class_tokens = x[:, :, :prefix]
    if prefix_mode == "zero" and not residual:
        class_tokens = torch.zeros_like(class_tokens)
    return torch.cat([class_tokens, out], dim=2)
