"""The same values elsewhere in memory: strides of 0, windows that overlap, permuted and sliced tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .opinfo import Sample


def _expanded(x: Tensor, *dims: int) -> Tensor:
    """Stride 0 in these dimensions: their first slice, repeated."""
    for dim in dims:
        x = x.narrow(dim, 0, min(1, x.shape[dim])).expand_as(x)
    return x


def _windows(x: Tensor, dim: int) -> Tensor:
    """A window that moves on by one step of the next dimension for each one of this: most elements share their memory."""
    x = x.contiguous()
    strides = list(x.stride())
    strides[dim] = strides[dim + 1]
    return x.as_strided(x.shape, strides)


def _permuted(x: Tensor, *order: int) -> Tensor:
    """Dimensions in another order in memory."""
    order = (*order, *range(len(order), x.dim()))
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])


def _sliced(x: Tensor) -> Tensor:
    """Every other one of the first dimension of a wider tensor."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 1, dtype=x.dtype, device=x.device).repeat_interleave(2, dim=0)
    part = wide[::2, ..., 2 : 2 + x.shape[-1]]
    return part.copy_(x)


# name -> (the least number of dimensions, how); the last dimension keeps its stride of 1
LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "first expanded": (2, lambda x: _expanded(x, 0)),
    "second expanded": (3, lambda x: _expanded(x, 1)),
    "third expanded": (4, lambda x: _expanded(x, 2)),
    "all expanded": (2, lambda x: _expanded(x, *range(x.dim() - 1))),
    "two expanded": (4, lambda x: _expanded(x, 0, 2)),
    "windows of the first": (3, lambda x: _windows(x, 0)),
    "windows of the second": (4, lambda x: _windows(x, 1)),
    "turned round": (3, lambda x: _permuted(x, *reversed(range(min(x.dim() - 1, 3))))),
    "second first": (3, lambda x: _permuted(x, 1, 0)),
    "second first, expanded": (4, lambda x: _expanded(_permuted(x, 1, 0), 2)),
    "sliced": (2, _sliced),
}


def relaid(x: Tensor, layout: str) -> Tensor:
    """x in that layout, where it has enough dimensions; expanded and overlapping ones change its values too."""
    least, arrange = LAYOUTS[layout]
    return arrange(x) if x.dim() >= least else x


def relaid_sample(sample: Sample, layout: str) -> Sample:
    """The call with each of its floating-point tensors, and frames of pixels, in that layout."""
    return sample.map(lambda x: x if x.dtype == torch.bool else relaid(x, layout))
