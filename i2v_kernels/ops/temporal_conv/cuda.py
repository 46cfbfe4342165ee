"""The backend ``cuda``: the kernels of csrc/temporal_conv/cuda.cu. CPU tensors would run their emulation, in tests."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import _extension
from ..layout import empty_dense_like
from .gradients import gradients

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
    prefix_mode: str, dilation: int, activation: str = "", gradient: bool = False, turned: bool = False,
) -> Tensor:  # fmt: skip
    weight = weight.flip(2, 3, 4) if turned else weight
    taps = weight.reshape(weight.shape[0], weight.shape[2:].numel()).t().contiguous()  # [taps, C]: channels innermost, as in x
    bias = bias if bias is None else bias.contiguous()
    grid = (height, width, prefix, prefix_mode == "copy", dilation)
    _extension.compiled("temporal_conv")(x, taps, bias, extra, out, weight.shape[2:], *grid, activation, gradient)
    return out


def _sum_products(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, prefix: int, dilation: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    dweight = dbias = grad.new_empty(0)
    channels, taps = weight.shape[0], weight.shape[1:].numel()
    vectors = max(1, channels * x.element_size() // 16) * weight.shape[3:].numel()
    shares = max(1, min(THREADS // vectors, x.shape[0] * (x.shape[2] - prefix)))
    weight_sums = torch.empty(shares, taps, channels, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(shares, channels, dtype=torch.float32, device=x.device)
    launch = _extension.compiled("temporal_conv_weight_sums")
    launch(grad, x, weight_sums, bias_sums, weight.shape[2:], height, width, prefix, dilation)
    if wanted[1]:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        dweight.copy_(weight_sums.sum(0).t().reshape(weight.shape))
    if wanted[2]:
        dbias = bias_sums.sum(0).to(weight.dtype)
    return dweight, dbias


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *options, residual = rest
    return _convolve(empty_dense_like(x), x, weight, bias, x if residual else None, *options)


backward = partial(gradients, _convolve, _sum_products, lambda *_: False)
