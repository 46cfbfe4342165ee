"""Ops made of PyTorch's matrix products: tokens as rows, a cache's worth at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .layout import memory_order

# Bytes of a bottleneck that a block holds: on a CPU a cache's worth, on a GPU enough to fill it.
BLOCK = {"cpu": 2 << 20, "cuda": 256 << 20}


def block_count(device: torch.device, bytes_each: int) -> int:
    """How many pieces of so many bytes make a block."""
    return max(1, BLOCK.get(device.type, BLOCK["cuda"]) // max(1, bytes_each))


def row_blocks(out: Tensor, others: tuple[Tensor, ...], count: int) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of at most ``count`` rows ``[rows, C]`` of ``out [..., C]``, whose memory is dense, and of others with its rows.

    Rows come in the order in which ``out`` has them in memory; those of others are views where they lie alike, else copies
    of the block alone.
    """
    tensors: tuple[Tensor, ...] = (out, *others)
    order, rows = _layout(tuple(x.stride() for x in tensors), *(x.shape for x in tensors))
    if order:
        tensors = tuple(x.permute(order) for x in tensors)
    if rows >= 0:
        flat = tuple(as_rows(x) for x in tensors)
        if rows <= count:
            yield flat
        else:
            yield from zip(*(x.tensor_split(-(-rows // count)) for x in flat))  # as large as each other
        return
    inner = max(1, tensors[0].shape[1:-1].numel())
    for parts in zip(*(x.split(max(1, count // inner)) for x in tensors)):
        yield tuple(as_rows(x) for x in parts)


@lru_cache(1024)
def _layout(strides: tuple[tuple[int, ...], ...], *shapes: torch.Size) -> tuple[tuple[int, ...], int]:
    """How the tensors are to be permuted, () for as they are, and the number of rows, -1 where one of them is none."""
    tensors = [torch.empty_strided(shape, stride, device="meta") for shape, stride in zip(shapes, strides)]
    order = (*memory_order(tensors[0]), len(shapes[0]) - 1)
    rows = shapes[0][:-1].numel() if all(viewable(x.permute(order)) for x in tensors) else -1
    return () if order == tuple(range(len(order))) else order, rows


def as_rows(x: Tensor) -> Tensor:
    """``[..., C]`` as ``[rows, C]``, a view where it can be one; ``reshape(-1, C)`` cannot count rows of no channels."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def viewable(x: Tensor) -> bool:
    """Whether ``[..., C]`` is ``[rows, C]`` without a copy."""
    steps = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()) if size != 1]
    return x.numel() == 0 or all(a[1] == b[0] * b[1] for a, b in pairwise(steps))


def project(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``F.linear(rows, weight, bias)``, into ``out`` if it is given."""
    if bias is None:
        return torch.mm(rows, weight.t(), out=out)
    return torch.addmm(bias, rows, weight.t(), out=out)


def added(total: Tensor | None, part: Tensor, dtype: torch.dtype) -> Tensor:
    """``total += part``, sums kept in that dtype; None is zero, and part nobody else's then: the sum is part as it is."""
    if total is None:
        return part
    return (total if total.dtype is dtype else total.to(dtype)).add_(part)


def gradient(total: Tensor | None, like: Tensor | None, wanted: bool, grad: Tensor) -> Tensor:
    """The sum as an op returns it: zeros where no block came, nothing where nobody wants it."""
    if not wanted or like is None:
        return grad.new_empty(0)
    if total is None:
        return torch.zeros(like.shape, dtype=grad.dtype, device=grad.device)
    return total if total.dtype is grad.dtype else total.to(grad.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """``total += alpha * a @ b`` where total may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=alpha)
    else:
        total.add_(a @ b, alpha=alpha)
