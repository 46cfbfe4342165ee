"""Convolutions that libraries are slow at: depthwise over time, and those that cut images and clips into patches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.temporal_conv import temporal_conv
from .rules import Found, Replacement, class_of, random_like


def depthwise_conv3d(module: Any) -> Found:
    """``nn.Conv3d(C, C, kernel, padding="same", groups=C)`` with kernel (k, 1, 1), (1, 3, 3) or (3, 3, 3)."""
    if class_of(module) is not nn.Conv3d or module.groups == 1:
        return None
    if not module.groups == module.in_channels == module.out_channels:
        return f"it is grouped, not depthwise: {module.groups} groups of {module.in_channels} channels"
    kernel, dilation = module.kernel_size, module.dilation
    if not (kernel[1:] == (1, 1) and kernel[0] in (3, 5, 7)) and kernel not in ((1, 3, 3), (3, 3, 3)):
        return f"its kernel {kernel} is none of (3|5|7, 1, 1), (1, 3, 3), (3, 3, 3)"
    if module.stride != (1, 1, 1):
        return f"its stride is {module.stride}"
    if dilation[1:] != (1, 1):
        return f"its dilation {dilation} is not over time alone"
    same = tuple(d * (k // 2) for k, d in zip(kernel, dilation))
    if module.padding not in (same, "same") or module.padding_mode != "zeros":
        return f"padding={module.padding!r}, padding_mode={module.padding_mode!r}: it does not keep the size with zeros"
    return Replacement(_depthwise, "temporal_conv", lambda m: (random_like(m, 2, m.in_channels, 4, 5, 3),), known=True)


def _depthwise(conv: Any, original: Any, input: Tensor) -> Tensor:
    x = input
    if x.dim() != 5 or (x.device.type == "cpu" and not _learns(conv, x)):  # on CPUs the library is slow in its backward alone
        return original(x)
    tokens = x.permute(0, 2, 3, 4, 1)  # [B, T, H, W, C]
    channels_last = tokens.stride(-1) == 1
    if not channels_last:
        tokens = tokens.contiguous()
    grid = (x.shape[3], x.shape[4])
    out = temporal_conv(tokens.flatten(2, 3), conv.weight, conv.bias, grid=grid, dilation=conv.dilation[0])
    out = out.unflatten(2, grid).permute(0, 4, 1, 2, 3)
    return out if channels_last else out.contiguous()  # what follows may call .view


def patches(module: Any) -> Found:
    """``nn.Conv2d`` or ``nn.Conv3d`` of an image's or a clip's colours whose stride is its kernel: one matrix product."""
    if class_of(module) not in (nn.Conv2d, nn.Conv3d) or module.in_channels > 4 or module.kernel_size != module.stride:
        return None
    if module.groups != 1 or any(d != 1 for d in module.dilation):
        return f"groups={module.groups}, dilation={module.dilation}"
    if module.padding != "valid" and any(module.padding):
        return f"padding={module.padding!r}: patches reach beyond the edge"
    shape = [2 * size for size in module.kernel_size]
    return Replacement(_patches, "one matrix product", lambda m: (random_like(m, 2, m.in_channels, *shape),), known=True)


def _patches(conv: Any, original: Any, input: Tensor) -> Tensor:
    x, kernel = input, conv.kernel_size
    if x.dim() != len(kernel) + 2 or any(size % k for size, k in zip(x.shape[2:], kernel)):
        return original(x)
    grid = [size // k for size, k in zip(x.shape[2:], kernel)]
    cut = x.reshape(*x.shape[:2], *(size for pair in zip(grid, kernel) for size in pair))  # a view: dimensions are split
    places = range(2, cut.dim(), 2)
    rows = cut.permute(0, *places, 1, *(place + 1 for place in places)).flatten(1 + len(grid)).flatten(1, len(grid))
    # Tokens [B, N, C] seen as [B, C, *grid]: flatten(2).transpose(1, 2), which follows, is then no copy.
    return F.linear(rows, conv.weight.flatten(1), conv.bias).transpose(1, 2).unflatten(2, grid)


def _learns(conv: Any, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in conv.parameters()))
