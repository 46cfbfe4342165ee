"""Tiles and strides of ``temporal_conv``'s Triton kernels."""

from __future__ import annotations

from torch import Tensor

from ..triton_common import pow2

WIDEST = 256  # channels of a tile


def tile(tokens: int, channels: int, vectors: int, itemsize: int) -> tuple[int, int]:
    """``(BN, BC)``: tokens and channels, so that each of 128 threads holds this many 16-byte vectors of a frame."""
    width = min(pow2(channels), WIDEST)
    return min(max(128 * vectors * (16 // itemsize) // width, 1), pow2(tokens)), width


def strides(**tensors: Tensor) -> dict[str, int]:
    return {f"s_{name}{axis}": stride for name, t in tensors.items() for axis, stride in zip("btn", t.stride())}
