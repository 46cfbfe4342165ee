"""Tiles, strides and small parts of ``temporal_conv``'s Triton kernels."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import cdiv, pow2

WIDEST, NARROWEST = 256, 64  # channels of a tile
LONGEST = 7  # taps in time whose frames and sums one thread holds


def tile(tokens: int, channels: int, itemsize: int) -> tuple[int, int]:
    """``(BN, BC)``: tokens and channels, so that each of 128 threads holds one 16-byte vector of a frame.

    BC is the widest that leaves the fewest lanes without a channel: 128 for 384.
    """
    width = min(pow2(channels), WIDEST)
    for narrower in (width // 2, width // 4):
        if narrower >= NARROWEST and cdiv(channels, narrower) * narrower < cdiv(channels, width) * width:
            width = narrower
    return min(max(128 * (16 // itemsize) // width, 1), pow2(tokens)), width


def strides(**tensors: Tensor) -> dict[str, int]:
    return {f"s_{name}{axis}": stride for name, t in tensors.items() for axis, stride in zip("btn", t.stride())}


def taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[taps, C]``: channels innermost, as in x."""
    channels, _, *kernel = weight.shape
    turned = torch.empty(math.prod(kernel), channels, dtype=dtype, device=weight.device)
    return turned.copy_(weight.reshape(channels, -1).t())


@triton.jit
def widen(b_x):
    """To float32. As integers: the upper half of a register takes one instruction so, two by Triton's own conversion."""
    if b_x.dtype == tl.bfloat16:
        return (b_x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def push(values, value):
    return values + (value,)  # noqa: RUF005  (Triton has no stars in tuples)


@triton.jit
def put(values, i: tl.constexpr, value):
    """The tuple with ``value`` at place i."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005
