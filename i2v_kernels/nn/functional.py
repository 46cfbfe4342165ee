"""The modules as functions of their parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops import temporal_attention, temporal_conv
from .tokens import joined


def temporal_self_attention(
    x: Tensor,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """Multi-head self-attention of every token over the frames of its clip: project, attend, project.

    The packed projection is read as it lies and its gradient written packed, without a copy.

    Args:
        x: ``[B, T, N, C]``.
        heads: H, a divisor of the attention's width ``H * D``.
        qkv_weight, qkv_bias: ``[3 * H * D, C]`` and ``[3 * H * D]``: q, k and v one after the other, as in timm and CLIP.
        proj_weight, proj_bias: ``[C, H * D]`` and ``[C]``.
        options: keywords of ``i2v_kernels.temporal_attention``: mask, bias, causal, window, offsets, scale, backend.

    Returns:
        ``[B, T, N, C]``.

    Raises:
        ValueError: heads does not divide the width; x has other than 4 dimensions or C channels.

    Examples:
        >>> import torch
        >>> x, weight = torch.randn(2, 8, 5, 16), torch.randn(48, 16)
        >>> temporal_self_attention(x, 2, weight, None, torch.eye(16), None, causal=True).shape
        torch.Size([2, 8, 5, 16])
    """
    width, rest = divmod(qkv_weight.shape[0], 3)
    if rest or heads < 1 or width % heads:
        raise ValueError(
            f"temporal_self_attention: heads={heads} and qkv_weight.shape={tuple(qkv_weight.shape)}, but [3 * H * D, C] is "
            "needed"
        )
    if x.dim() != 4 or x.shape[3] != qkv_weight.shape[1]:
        raise ValueError(f"temporal_self_attention: x.shape={tuple(x.shape)}, but [B, T, N, {qkv_weight.shape[1]}] is needed")
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(3, (3, heads, width // heads))
    return F.linear(temporal_attention(qkv, **options).flatten(3), proj_weight, proj_bias)


def token_t1d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of the class token over the frames, zeros outside the clip; the other tokens stay.

    Args:
        x: ``[B, T, N, C]``, the class token first.
        weight: ``[C, 1, 3]`` as in ``nn.Conv1d(C, C, 3, groups=C)``.

    Returns:
        ``[B, T, N, C]``, its dimensions in x's order in memory.

    Examples:
        >>> import torch
        >>> x = torch.randn(2, 8, 5, 16)
        >>> token_t1d(x, torch.tensor([0.0, 1.0, 0.0]).expand(16, 1, 3)).equal(x)
        True
    """
    class_token, patches = x.split([1, x.shape[2] - 1], dim=2)  # split and cat: each the other's gradient, one copy a way
    parts = temporal_conv(class_token, weight[..., None, None]), patches
    return joined(parts, x)
