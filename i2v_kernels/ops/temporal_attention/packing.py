"""q, k and v as three tensors, or as one packed ``[B, T, N, 3, H, D]`` with k and v None."""

from __future__ import annotations

from torch import Tensor

from ..base import empty_dense_like


def unpacked(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Three ``[B, T, N, H, D]``, views of a packed one."""
    if k is None or v is None:
        return q.select(3, 0), q.select(3, 1), q.select(3, 2)
    return q, k, v


def empty_output(q: Tensor, k: Tensor | None = None, *_: object) -> Tensor:
    """Memory for the output: as q's ``[B, T, N, H, D]``."""
    return empty_dense_like(q if k is not None else q.select(3, 0))


def empty_grads(grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients of the three, or packed in the first with two empty tensors beside it."""
    if k is None or v is None:
        return empty_dense_like(q), grad.new_empty(0), grad.new_empty(0)
    return empty_dense_like(q), empty_dense_like(k), empty_dense_like(v)
