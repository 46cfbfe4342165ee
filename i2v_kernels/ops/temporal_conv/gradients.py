"""The backward of the GPU backends, out of what they launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import empty_dense_like


def gradients(
    convolve: Callable[..., Tensor], sum_products: Callable[..., tuple[Tensor, Tensor]],
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, prefix_mode: str,
    dilation: int, activation: str, residual: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias; an empty tensor for one that is not wanted.

    ``convolve(out, x, weight, bias, extra, *grid, activation="", gradient=False, turned=False)``: the activation of the
    convolution plus ``extra``, or with ``gradient``: ``extra`` being the gradient behind the activation, that before it;
    ``turned``: with the kernel turned round. ``sum_products(grad, x, weight, height, width, prefix, dilation)``: partial sums
    in float32, ``[P, taps, C]`` of the weight and ``[P, C]`` of the bias.
    """
    dx = dweight = dbias = grad.new_empty(0)
    grid: tuple[Any, ...] = (height, width, prefix, prefix_mode, dilation)
    before = grad  # the activation
    if activation:
        before = convolve(empty_dense_like(grad), x, weight, bias, grad, *grid, activation, gradient=True)
    if wanted[0]:
        dx = convolve(empty_dense_like(x), before, weight, None, grad if residual else None, *grid, turned=True)
    if wanted[1] or wanted[2]:
        weight_sums, bias_sums = sum_products(before, x, weight, height, width, prefix, dilation)
        if wanted[1]:
            dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            dweight.copy_(weight_sums.sum(0).t().reshape(weight.shape))
        if wanted[2]:
            dbias = bias_sums.sum(0).to(weight.dtype)
    return dx, dweight, dbias
