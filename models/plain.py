"""The temporal operations as the published code writes them: regroup, run a stock PyTorch operation, regroup back.

Same numbers as the package's ops, kept so that both can be timed and compared (``kernels=False``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def frames_last(x: Tensor, frames: int) -> Tensor:
    """``[B*T, L, C]`` to ``[B*L, T, C]``: every token a sequence of its own over the frames (a copy)."""
    length, channels = x.shape[1:]
    return x.view(x.shape[0] // frames, frames, length, channels).transpose(1, 2).flatten(0, 1)


def tokens_last(x: Tensor, length: int) -> Tensor:
    """``[B*L, T, C]`` back to ``[B*T, L, C]`` (a copy)."""
    frames, channels = x.shape[1:]
    return x.view(x.shape[0] // length, length, frames, channels).transpose(1, 2).flatten(0, 1)


def temporal_conv(x: Tensor, conv: nn.Module, frames: int, grid: tuple[int, int]) -> Tensor:
    """A depthwise ``nn.Conv3d`` of patches ``[B*T, H*W, C]``: to channels first and back, two copies."""
    x = conv(x.view(x.shape[0] // frames, frames, *grid, x.shape[-1]).permute(0, 4, 1, 2, 3).contiguous())
    return x.permute(0, 2, 3, 4, 1).contiguous().flatten(2, 3).flatten(0, 1)


def shift_class_token(x: Tensor, frames: int, fold: int) -> Tensor:
    """TokShift on ``x [B*T, L, C]``: class-token channels ``[0, fold)`` from t + 1, ``[fold, 2 * fold)`` from t -
    1.
    """
    x = x.view(x.shape[0] // frames, frames, *x.shape[1:])
    out = torch.zeros_like(x)
    out[:, :-1, 0, :fold] = x[:, 1:, 0, :fold]
    out[:, 1:, 0, fold : 2 * fold] = x[:, :-1, 0, fold : 2 * fold]
    out[:, :, 1:, : 2 * fold] = x[:, :, 1:, : 2 * fold]
    out[:, :, :, 2 * fold :] = x[:, :, :, 2 * fold :]
    return out.flatten(0, 1)
