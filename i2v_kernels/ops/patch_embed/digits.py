"""The float32 product as three products of bytes, where the processor multiplies bytes four times as fast.

Pixels are bytes already. The weights of a channel become whole numbers of 24 bits, the largest 0x7f7f7d, and these three digits
to the base 256, each an int8. PyTorch multiplies pixels by digits and sums them in int32, exactly. What is rounded are weights,
by 2**-24 of the channel's largest, and the result. A float32 sum rounds each time it adds, which is more unless one weight
outweighs all others: channels where the largest holds more than half of the sum of squares are left to the float32 product.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ... import _extension
from ..products import as_rows, block_count
from . import blocks
from .fold import centre, fold

DIGITS = 3


@cache
def bytes_are_fast() -> bool:
    """Whether the processor has AVX-512 VNNI, and PyTorch's product of bytes uses it or is exact otherwise.

    Without the instruction oneDNN adds pairs of products in 16 bits, which overflow.
    """
    if not _extension.load()[0].build_info()["vnni"]:
        return False
    rows = torch.full((64, 256), 127, dtype=torch.int8, device="cpu")
    try:
        sums = torch._int_mm(rows, rows[:48].t())
    except RuntimeError:  # a build without such a product
        return False
    return bool((sums == 127 * 127 * 256).all())


def forward(frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> Tensor:
    size = weight.shape[1:].numel()
    if weight.dtype == torch.float32 and size < 1 << 16 and bytes_are_fast():  # more could overflow int32
        out = blocks.empty_output(frames, weight)
        if _fill(as_rows(out), frames, weight, bias, mean, std):
            return out
    return blocks.forward(frames, weight, bias, mean, std)


def _fill(out: Tensor, frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> bool:
    """Fills ``[rows, C]``, or returns False: a channel's weights are not finite, or do not suit whole numbers."""
    matrix, vector = fold(weight, bias, mean, std)
    channels, size = matrix.shape
    # Whatever default dtype and default device are set.
    digits = torch.empty(DIGITS * channels, size, dtype=torch.int8, device="cpu")
    correction = torch.empty(DIGITS, channels, dtype=torch.int32, device="cpu")  # for pixels are counted from 128, not from m
    scale = torch.empty(channels, dtype=torch.float32, device="cpu")
    if not _extension.compiled("split_weight")(matrix, centre(mean), digits, correction, scale):
        return False
    count = 4 * block_count(out.device, DIGITS * channels * 4)  # as blocks.rows_of_a_block: each product packs the digits
    parts = out.tensor_split(max(1, -(-len(out) // count)))
    rows = torch.empty(len(parts[0]), size, dtype=torch.int8, device="cpu")
    sums = torch.empty(len(parts[0]), DIGITS * channels, dtype=torch.int32, device="cpu")
    first = 0
    for part in parts:
        pixels, products = rows[: len(part)], sums[: len(part)]
        _extension.compiled("patch_rows")(frames, centre(mean), *weight.shape[2:], first, pixels)
        torch._int_mm(pixels, digits.t(), out=products)
        _extension.compiled("join_digits")(products, correction, scale, vector, part)
        first += len(part)
    return True
