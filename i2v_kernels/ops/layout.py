"""Where outputs and buffers lie in memory: one rule, for what computes and for what stands in for it in ``torch.compile``.

Dimensions come in the order in which the input has them in memory, dense and the last one innermost, as ``torch.empty_like``
arranges them: an input whose elements share memory (expanded, or windows that overlap) has no order of its own, and gets the
same one for every tensor that is made after it. ``csrc/common/tensor.h`` has the rule in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_dense_like(x: Tensor) -> Tensor:
    """Uninitialised memory of x's shape in x's order of dimensions, the last one innermost."""
    if x.is_contiguous():  # but of a single entry's stride, of a view, it may be anything
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 or out.shape[-1] == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of ``[..., C]`` but the last, from the outermost to the innermost of what ``empty_dense_like`` gives."""
    if x.is_contiguous():
        return list(range(x.dim() - 1))
    strides = empty_dense_like(torch.empty_like(x, device="meta")).stride()
    return sorted(range(x.dim() - 1), key=lambda i: -strides[i])


def empty_tokens(like: Tensor, channels: int) -> Tensor:
    """Uninitialised memory ``[..., channels]``, its dimensions in the order of those of ``like [..., C]``."""
    order = memory_order(like)
    memory = torch.empty([like.shape[i] for i in order] + [channels], dtype=like.dtype, device=like.device)
    if order == list(range(len(order))):
        return memory
    return memory.permute(*(order.index(i) for i in range(len(order))), len(order))


def arranged(x: Tensor, like: Tensor) -> Tensor:
    """x with its dimensions in the order in memory of ``like``, which is dense."""
    if x.stride() == like.stride():
        return x
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda i: -strides[i])
    return x.permute(order).contiguous().permute([order.index(i) for i in range(like.dim())])
