"""The backward of the GPU backends, out of what they launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..layout import empty_dense_like


def gradients(
    convolve: Callable[..., Tensor], sum_products: Callable[..., tuple[Tensor, Tensor]], together: Callable[..., bool],
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, prefix_mode: str,
    dilation: int, activation: str, residual: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias; an empty tensor for one that is not wanted.

    ``convolve(out, x, weight, bias, extra, *grid, activation="", gradient=False, turned=False)``: the activation of the
    convolution plus ``extra``, or with ``gradient``: ``extra`` being the gradient behind the activation, that before it;
    ``turned``: with the kernel turned round. ``sum_products(grad, x, weight, height, width, prefix, dilation, wanted)``: the
    gradients of weight and bias. If ``together(kt, kh, kw)`` it also takes ``dx``, which it then writes, and whether this has
    ``grad`` at prefix tokens, and ``grad`` added.
    """
    dx = dweight = dbias = grad.new_empty(0)
    grid: tuple[Any, ...] = (height, width, prefix, prefix_mode, dilation)
    before = grad  # the activation
    if activation:
        before = convolve(empty_dense_like(grad), x, weight, bias, grad, *grid, activation, gradient=True)
    parameters = wanted[1] or wanted[2]
    both = wanted[0] and parameters and together(*weight.shape[2:]) and not (activation and residual)
    if wanted[0]:
        dx = empty_dense_like(x)
        if not both:
            convolve(dx, before, weight, None, grad if residual else None, *grid, turned=True)
    if parameters:
        more = (dx, prefix_mode == "copy", residual) if both else ()
        dweight, dbias = sum_products(before, x, weight, height, width, prefix, dilation, wanted, *more)
    return dx, dweight, dbias
