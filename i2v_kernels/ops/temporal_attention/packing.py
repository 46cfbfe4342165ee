"""q, k and v as three ``[B, T, N, H, D]``, or all in q as ``[B, T, N, 3, H, D]`` with nothing in the other two."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..layout import empty_dense_like


def unpacked(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three, as views if they are packed."""
    if q.dim() == 6:
        q, k, v = q.unbind(3)
    return q, k, v  # type: ignore[return-value]


def empty_output(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Memory for the output, as q's ``[B, Tq, N, H, D]``, and for the log-sum-exp ``[B, Tq, N, H]``, empty unless the last
    argument wants it.
    """
    out = empty_dense_like(q.select(3, 0) if q.dim() == 6 else q)
    shape = out.shape[:-1] if rest[-1] else (0,)
    return out, torch.empty(shape, dtype=accumulate_dtype(q.dtype), device=q.device)


def empty_grads(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what the backward op returns; empty where there is nothing to return. The last argument: whether the
    bias's gradient is wanted.
    """

    def like(x: Tensor | None) -> Tensor:
        return torch.empty(0, dtype=grad.dtype, device=grad.device) if x is None else empty_dense_like(x)

    return empty_dense_like(q), like(k), like(v), like(bias if rest[-1] else None)
