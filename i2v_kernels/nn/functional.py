"""The modules as functions of their parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import temporal_attention, temporal_conv, video_cross_attention
from .tokens import in_order, joined

Affine = tuple[Tensor, Tensor | None]  # weight and bias


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


def projected_cross_attention(
    x: Tensor,
    features: Tensor,
    heads: int,
    q: Affine,
    k: Affine,
    v: Affine,
    out: Affine,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
    fold: bool | None = None,
) -> Tensor:
    """Multi-head attention of a clip's queries to all tokens of its frames: project, attend, project.

    Folded, keys and values are never made. With ``f`` a token's features behind the layer norm, ``n`` the same without its
    weight and bias (gamma, beta), ``f = gamma * n + beta``:

    - a score ``<q_h, W_k,h f + b_k,h>`` is ``<gamma * (W_k,h^T q_h), n>`` and what all tokens of a query share, which drops out
      of the softmax: beta and the bias of the keys get no gradient from it;
    - ``sum_j p_j (W_v,h f_j + b_v,h) = W_v,h (gamma * sum_j p_j n_j + beta) + b_v,h``, as the weights ``p_j`` sum to one.

    So one attention with as many queries as queries and heads together, of width C, over ``n`` as keys and values at once.

    Args:
        x: ``[B, Q, Cq]``, the queries.
        features: ``[B, T, N, C]``, any strides but 1 in the last dimension.
        heads: H.
        q, k, v: weight ``[H * D, C]`` (of q: ``[H * D, Cq]``) and bias ``[H * D]`` or None.
        out: weight ``[Cq, H * D]`` and bias.
        norm: weight, bias and eps of a layer norm of the features, or None.
        mask: ``[B, T]`` bool, True where the frame is valid. A clip without a valid frame gives the last bias.
        backend: of ``i2v_kernels.video_cross_attention``.
        fold: whether to fold; None: where ``4 * Q * H <= C``. Folded, a token costs ``2 * Q * H * C`` multiplications in two
            narrow products, else ``2 * C * H * D`` in wide ones.

    Returns:
        ``[B, Q, Cq]``.

    Raises:
        ValueError: heads does not divide the width of the projections. Whatever ``i2v_kernels.video_cross_attention`` raises.

    Examples:
        >>> import torch
        >>> x, features = torch.randn(2, 1, 16), torch.randn(2, 8, 5, 16)
        >>> parts = [(torch.randn(16, 16), torch.randn(16))] * 4
        >>> folded = projected_cross_attention(x, features, 4, *parts, fold=True)
        >>> plain = projected_cross_attention(x, features, 4, *parts, fold=False)
        >>> torch.allclose(folded, plain, rtol=1e-2, atol=1e-3)
        True
    """
    width = k[0].shape[0]
    if heads < 1 or width % heads:
        raise ValueError(
            f"projected_cross_attention: heads={heads} and k[0].shape={tuple(k[0].shape)}, but [H * D, C] is needed"
        )
    queries = F.linear(x, *q).unflatten(2, (heads, -1))  # [B, Q, H, D]
    if fold is None:
        fold = 4 * x.shape[1] * heads <= features.shape[3]
    if not fold:
        seen = features if norm is None else in_order(lambda f: F.layer_norm(f, f.shape[-1:], *norm), features)
        keys, values = (
            in_order(partial(F.linear, weight=weight, bias=bias), seen).unflatten(3, (heads, -1)) for weight, bias in (k, v)
        )
        mixed = video_cross_attention(queries, keys, values, mask=mask, backend=backend)
        return F.linear(mixed.flatten(2), *out)
    gamma, beta, eps = (None, None, None) if norm is None else norm
    seen = features if eps is None else in_order(lambda f: F.layer_norm(f, f.shape[-1:], eps=eps), features)
    asked = torch.einsum("bqhd,hdc->bqhc", queries, k[0].unflatten(0, (heads, -1)))
    if gamma is not None:
        asked = asked * gamma
    tokens = seen[:, :, :, None]  # [B, T, N, 1, C], keys and values of one wide head
    rows = asked.flatten(1, 2)[:, :, None]  # [B, Q * H, 1, C]
    scale = (width // heads) ** -0.5
    found = video_cross_attention(rows, tokens, tokens, mask=mask, scale=scale, backend=backend).view_as(asked)
    there = None if mask is None else mask.any(1)[:, None, None, None].to(found.dtype)  # the sum of the weights p

    def added(total: Tensor, bias: Tensor) -> Tensor:
        return total + (bias if there is None else bias * there)

    if gamma is not None:
        found = found * gamma
    if beta is not None:
        found = added(found, beta)
    mixed = torch.einsum("bqhc,hdc->bqhd", found, v[0].unflatten(0, (heads, -1)))
    if v[1] is not None:
        mixed = added(mixed, v[1].unflatten(0, (heads, -1)))
    if k[1] is not None:
        mixed = mixed + 0 * k[1].sum()  # a gradient of zero, as those who look for parameters without one expect
    return F.linear(mixed.flatten(2), *out)
