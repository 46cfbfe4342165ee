"""``patch_embed`` by PyTorch's matrix products, over patches gathered a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ... import _extension
from ..base import accumulate_dtype
from ..products import add_product, block_count, viewable
from .fold import centre, fold, rests, unfold

# (frames, centre, patch height and width, the first patch, rows [n, ph * pw * 3] to fill)
Gather = Callable[[Tensor, list[int], int, int, int, Tensor], None]


def patch_rows(*args: object) -> None:
    """The C++ kernel, csrc/patch_embed/cpu.cpp."""
    _extension.compiled("patch_rows")(*args)


def rows_of_a_block(weight: Tensor) -> int:
    """On a CPU more than elsewhere: every product packs all of the weight again, and patches are cheap to read from memory."""
    count = block_count(weight.device, weight.shape[1:].numel() * weight.element_size())
    return 4 * count if weight.device.type == "cpu" else count


def empty_output(frames: Tensor, weight: Tensor, *_: object) -> Tensor:
    clips, length, height, width, _channels = frames.shape
    tokens = (height // weight.shape[2]) * (width // weight.shape[3])
    return torch.empty(clips, length, tokens, weight.shape[0], dtype=weight.dtype, device=weight.device)


def token_blocks(x: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """``[B, T, N, C]`` as blocks of about ``count`` rows ``[rows, C]`` in order, each with the number of its first row.

    Blocks are whole frames while these are smaller: then those that lie apart, as slices behind a class token do, are copied
    block by block, and none that lie together.
    """
    if x.numel() == 0:
        return
    tokens, first = x.shape[2], 0
    frames = x.flatten(0, 1) if viewable(x[:, :, 0]) else x.reshape(-1, *x.shape[2:])
    blocks = -(-len(frames) // max(1, count // tokens))
    for part in frames.tensor_split(blocks):
        for rows in part.tensor_split(-(-tokens // count), dim=1):
            flat = rows.reshape(-1, x.shape[3])
            yield first, flat
            first += len(flat)


def gathered(
    gather: Gather, frames: Tensor, weight: Tensor, mean: list[float], tokens: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of ``tokens [B, T, N, C]`` and the patches that belong to them, ``[rows, ph * pw * 3]``, in the same memory."""
    height, width = weight.shape[2:]
    size = height * width * 3
    memory = weight.new_empty(0, size)
    for first, block in token_blocks(tokens, rows_of_a_block(weight)):
        if len(memory) < len(block):
            memory = weight.new_empty(len(block), size)
        rows = memory[: len(block)]
        gather(frames, centre(mean), height, width, first, rows)
        yield block, rows


def forward(
    frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float], gather: Gather = patch_rows,
    folded: Callable[..., tuple[Tensor, Tensor]] = fold,
) -> Tensor:  # fmt: skip
    out = empty_output(frames, weight)
    matrix, vector = folded(weight, bias, mean, std)
    vector = vector.to(weight.dtype)
    for into, rows in gathered(gather, frames, weight, mean, out):
        torch.addmm(vector, rows, matrix.t(), out=into)
    return out


def backward(
    grad: Tensor, frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float], wanted: list[bool],
    gather: Gather = patch_rows, unfolded: Callable[..., Tensor] = unfold,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What of the gradients of weight and bias is wanted; the patches are gathered again."""
    wide = accumulate_dtype(weight.dtype)
    wants_bias, wants_sums = wanted[1] and bias is not None, wanted[1] or any(rests(mean))
    product = torch.zeros(len(weight), weight.shape[1:].numel(), dtype=wide, device=weight.device)
    sums = torch.zeros(len(weight), dtype=wide, device=weight.device)
    if wanted[0]:
        for block, rows in gathered(gather, frames, weight, mean, grad):
            add_product(product, block.t(), rows)
            if wants_sums:
                sums += block.sum(0)  # summed in float32; asked for it, PyTorch would convert all rows first
    elif wants_bias:
        sums = grad.sum((0, 1, 2), dtype=wide)
    nothing = grad.new_empty(0)
    return (
        unfolded(product, sums, weight, mean, std) if wanted[0] else nothing,
        sums.to(weight.dtype) if wants_bias else nothing,
    )
