"""``lora_linear`` by PyTorch's matrix products, the low-rank one added into the output of the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_dense_like, empty_tokens
from ..products import project, row_blocks


def forward(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    out = empty_tokens(x, weight.shape[0])
    for into, rows in row_blocks(out, (x,), max(out.numel(), 1)):
        project(rows, weight, bias, into)
        if scaling == 0:  # which addmm takes for leave to read nothing, NaN neither
            into += rows @ lora_a.t() @ lora_b.t() * scaling
        else:
            into.addmm_(rows @ lora_a.t(), lora_b.t(), alpha=scaling)
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the five gradients is wanted, from x alone: the low-rank product is computed again."""
    dx = empty_dense_like(x)
    parts: list[list[Tensor]] = [[], [], [], []]  # of weight, lora_a, lora_b, bias: one of each block, there is seldom a second
    for into, rows, rows_grad in row_blocks(dx, (x, grad), max(dx.numel(), 1)):
        if wanted[1]:
            parts[0].append(rows_grad.t() @ rows)
        if wanted[3]:
            parts[2].append((rows_grad.t() @ (rows @ lora_a.t())).mul_(scaling))
        if wanted[4] and bias is not None:
            parts[3].append(rows_grad.sum(0))
        if not (wanted[0] or wanted[2]):
            continue
        d_low = (rows_grad @ lora_b).mul_(scaling)
        if wanted[2]:
            parts[1].append(d_low.t() @ rows)
        if wanted[0]:
            torch.mm(rows_grad, weight, out=into).addmm_(d_low, lora_a)
    nothing = grad.new_empty(0)
    parameters = (weight, lora_a, lora_b, bias)
    sums = (_sum(found, like) if want and like is not None else nothing
            for found, want, like in zip(parts, wanted[1:], parameters))  # fmt: skip
    return (dx if wanted[0] else nothing, *sums)


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum(0) if parts else torch.zeros(like.shape, dtype=like.dtype, device=like.device)
