"""Normalisation folded into the weights.

With ``m = round(255 * mean)`` and ``x = (pixel - m) / 256``, which is exact in 16 bits too,
``w * (pixel / 255 - mean) / std = w' * x + w' * r``, where ``w' = w * 256 / (255 * std)`` and ``r = (m - 255 * mean) / 256``
is at most 1/512: measured from m, nothing large is left that bias and product would have to cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..layout import empty_dense_like


def centre(mean: Sequence[float]) -> list[int]:
    """m: what pixels are measured from, itself a pixel value."""
    return [min(max(round(255 * value), 0), 255) for value in mean]


def scales(std: Sequence[float]) -> list[float]:
    return [256 / (255 * value) for value in std]


def rests(mean: Sequence[float]) -> list[float]:
    """r."""
    return [(m - 255 * value) / 256 for m, value in zip(centre(mean), mean)]


def fold(weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    """``[C, 3, ph, pw]`` and ``[C]`` -> w' in the order of the frames, ``[C, ph * pw * 3]``, and the bias in the dtype of sums.

    The bias makes up for r by w' as it is rounded.
    """
    channels, _, height, width = weight.shape
    wide, size = accumulate_dtype(weight.dtype), height * width * 3
    scaled = (weight.to(wide) * _numbers(scales(std), weight)[:, None, None]).to(weight.dtype)
    matrix = torch.empty(channels, size, dtype=weight.dtype, device=weight.device)
    matrix.unflatten(1, (height, width, 3)).copy_(scaled.permute(0, 2, 3, 1))
    shift = (scaled.to(wide).sum((2, 3)) * _numbers(rests(mean), weight)).sum(1)
    return matrix, shift if bias is None else shift + bias


def unfold(product: Tensor, sums: Tensor, weight: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The gradient of ``weight`` from ``product = grad^T x`` ``[C, ph * pw * 3]`` and the sums of grad ``[C]``."""
    by_pixel = product.view(len(weight), *weight.shape[2:], 3)
    rest = sums[:, None] * _numbers(rests(mean), weight)  # [C, 3]
    grad = (by_pixel + rest[:, None, None]) * _numbers(scales(std), weight)
    return empty_dense_like(weight).copy_(grad.permute(0, 3, 1, 2))


def _numbers(values: list[float], like: Tensor) -> Tensor:
    """One for each colour, in the dtype of sums. Filled in, not copied from the host, which a CUDA graph could not hold."""
    return torch.stack([like.new_full((), value, dtype=accumulate_dtype(like.dtype)) for value in values])
