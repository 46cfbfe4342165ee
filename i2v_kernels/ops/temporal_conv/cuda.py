"""The backend ``cuda``: the kernels of csrc/temporal_conv/cuda.cu. CPU tensors would run their emulation, in tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _extension
from ..activations import ACTIVATIONS
from ..base import empty_dense_like

LONGEST = 7
THREADS = 1 << 17  # that sum the weight gradient: enough to fill a large GPU


def can_run(x: Tensor, weight: Tensor, *_: Any) -> str | None:
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}"
    return limits(x, weight) or _extension.why_no_cuda()


def limits(x: Tensor, weight: Tensor) -> str | None:
    """What of a call the kernels do not take."""
    if x.dtype == torch.float64:
        return "float64: only reference and cpu compute in double precision"
    if weight.shape[2] > LONGEST:
        return f"kt={weight.shape[2]}: the kernels reach over at most {LONGEST} frames"
    return None


def _convolve(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Tensor | None, height: int, width: int, prefix: int,
    prefix_mode: str, dilation: int, activation: str = "", gradient: bool = False,
) -> Tensor:  # fmt: skip
    taps = weight.reshape(weight.shape[0], -1).t().contiguous()  # [taps, C]: channels innermost, as in x
    number = ("", *ACTIVATIONS).index(activation)
    bias = bias if bias is None else bias.contiguous()
    launch = _extension.compiled("temporal_conv")
    launch(
        x, taps, bias, extra, out, weight.shape[2:], height, width, prefix, prefix_mode == "copy", dilation, number, gradient
    )
    return out


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, prefix_mode: str, dilation: int,
    activation: str, residual: bool,
) -> Tensor:  # fmt: skip
    rest = (height, width, prefix, prefix_mode, dilation, activation)
    return _convolve(empty_dense_like(x), x, weight, bias, x if residual else None, *rest)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, prefix_mode: str,
    dilation: int, activation: str, residual: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias; an empty tensor for one that is not wanted."""
    dx = dweight = dbias = torch.empty(0, dtype=grad.dtype, device=grad.device)
    grid = (height, width, prefix, prefix_mode, dilation)
    before = grad  # the activation
    if activation:
        before = _convolve(empty_dense_like(grad), x, weight, bias, grad, *grid, activation, gradient=True)
    if wanted[0]:
        dx = _convolve(empty_dense_like(x), before, weight.flip(2, 3, 4), None, grad if residual else None, *grid)
    if wanted[1] or wanted[2]:
        channels, taps = weight.shape[0], weight[0].numel()
        vectors = max(1, channels * x.element_size() // 16) * weight[0, 0, 0].numel()
        shares = max(1, min(THREADS // vectors, x.shape[0] * (x.shape[2] - prefix)))
        weight_sums = torch.empty(shares, taps, channels, dtype=torch.float32, device=x.device)
        bias_sums = torch.empty(shares, channels, dtype=torch.float32, device=x.device)
        launch = _extension.compiled("temporal_conv_weight_sums")
        launch(before, x, weight_sums, bias_sums, weight.shape[2:], height, width, prefix, dilation)
        if wanted[1]:
            dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            dweight.copy_(weight_sums.sum(0).t().reshape(weight.shape))
        if wanted[2]:
            dbias = bias_sums.sum(0).to(weight.dtype)
    return dx, dweight, dbias
