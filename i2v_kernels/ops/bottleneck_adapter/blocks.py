"""``bottleneck_adapter`` by PyTorch's matrix products, a few thousand tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import activate, activation_gradient
from ..base import accumulate_dtype
from ..layout import empty_dense_like, empty_tokens
from ..products import added, block_count, gradient, project, row_blocks

aten = torch.ops.aten


def rows_of_a_block(x: Tensor, down_weight: Tensor) -> int:
    return block_count(x.device, down_weight.shape[0] * x.element_size())


def forward(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, activation: str, scale: float, residual: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, kept = empty_output(x, down_weight, keep)
    for into, rows, *hidden in row_blocks(out, (x, kept) if keep else (x,), rows_of_a_block(x, down_weight)):
        normed = rows if norm_weight is None else F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
        active = activate(project(normed, down_weight, down_bias, *hidden), activation)
        if scale == 0:  # which addmm takes for leave to read nothing, NaN neither
            torch.mul(project(active, up_weight, up_bias), scale, out=into)
            if residual:
                into += rows
        elif up_bias is not None:
            torch.addmm(up_bias, active, up_weight.t(), beta=scale, alpha=scale, out=into)
            if residual:
                into += rows
        elif residual:
            torch.addmm(rows, active, up_weight.t(), alpha=scale, out=into)
        else:
            torch.mm(active, up_weight.t(), out=into).mul_(scale)
    return out, kept


def empty_output(x: Tensor, down_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Memory for the output and, if the last argument wants it, the bottleneck before its activation."""
    return empty_dense_like(x), empty_tokens(x, down_weight.shape[0]) if rest[-1] else x.new_empty(0)


def backward(
    grad: Tensor, x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, activation: str, scale: float, residual: bool,
    kept: Tensor, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the seven gradients is wanted. A bottleneck that was not kept is computed again.

    Of a layer norm only ``(x - mean) / deviation`` is computed again: its weight goes into ``down``, and its gradients come
    out of that of ``down``.
    """
    dx, want = empty_dense_like(x), dict(zip(("x", "down", "down_bias", "up", "up_bias", "norm", "norm_bias"), wanted))
    dtype = accumulate_dtype(x.dtype)
    d_down: Any = None  # zero until there is a first block, and seldom is there another
    d_up: Any = None
    d_down_bias: Any = None
    d_up_bias: Any = None
    has_norm, has_kept = norm_weight is not None, kept.shape == (*x.shape[:-1], down_weight.shape[0])
    down = down_weight * norm_weight if norm_weight is not None else down_weight
    start = down_bias
    if norm_bias is not None:
        start = down_weight @ norm_bias if down_bias is None else down_bias + down_weight @ norm_bias
    scaled_up = up_weight if scale == 1 else up_weight * scale
    into_down = want["down"] or want["norm"]
    below = want["x"] or into_down or want["down_bias"] or want["norm_bias"]
    others = (x, grad, kept) if has_kept else (x, grad)
    for into, rows, rows_grad, *hidden in row_blocks(dx, others, rows_of_a_block(x, down_weight)):
        if want["up_bias"]:
            # summed in float32; asked for it, PyTorch would convert all rows first
            d_up_bias = added(d_up_bias, rows_grad.sum(0), dtype)
        if not below and not want["up"]:
            continue
        needs_norm = has_norm and (into_down or want["x"] or not has_kept)
        normed, *statistics = aten.native_layer_norm(rows, rows.shape[-1:], None, None, eps) if needs_norm else (rows,)
        before = hidden[0] if has_kept else project(normed, down, start)
        if want["up"]:
            d_up = added(d_up, rows_grad.t() @ activate(before, activation), dtype)
        if not below:
            continue
        d_hidden = activation_gradient(rows_grad @ scaled_up, before, activation)
        if into_down:
            d_down = added(d_down, d_hidden.t() @ normed, dtype)
        if want["down_bias"] or has_norm:
            d_down_bias = added(d_down_bias, d_hidden.sum(0), dtype)
        if not want["x"]:
            continue
        if has_norm:
            known = (*statistics, None, None, [True, False, False])
            d_rows = aten.native_layer_norm_backward(d_hidden @ down, rows, rows.shape[-1:], *known)[0]
            torch.add(d_rows, rows_grad, out=into) if residual else into.copy_(d_rows)
        elif residual:
            torch.addmm(rows_grad, d_hidden, down, out=into)
        else:
            torch.mm(d_hidden, down, out=into)
    d_norm: Any = None
    d_norm_bias: Any = None
    if norm_weight is not None:
        d_down, d_down_bias = (
            torch.zeros(shape, dtype=dtype, device=x.device) if d is None else d.to(dtype)
            for d, shape in ((d_down, down_weight.shape), (d_down_bias, down_weight.shape[:1]))
        )
        wide = down_weight.double()  # their terms cancel
        d_norm, d_norm_bias = (d_down * wide).sum(0), d_down_bias.double() @ wide
        d_down = d_down * norm_weight
    if norm_bias is not None:
        d_down = torch.addr(d_down, d_down_bias, norm_bias.to(dtype))
    if scale != 1:
        d_up, d_up_bias = (None if d is None else d.to(dtype).mul_(scale) for d in (d_up, d_up_bias))
    grads = (dx, d_down, d_down_bias, d_up, d_up_bias, d_norm, d_norm_bias)
    parameters = (x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    return tuple(gradient(g, p, w, grad) for g, p, w in zip(grads, parameters, wanted))
