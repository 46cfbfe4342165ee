"""The route for many queries: PyTorch's attention for CPUs on views of clips, or of their frames, joined by its log-sum-exp.

Its products are the library's, and its backward takes output and log-sum-exp of the whole: keys are never brought together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import empty_dense_like
from ..temporal_attention.sdpa import finite
from . import reference

MANY = 64  # queries of a clip, times the bytes of a number, from which on this route is the faster one: README.md
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def pays(q: Tensor) -> bool:
    """Whether this route is preferred."""
    return q.is_cpu and q.shape[1] * q.element_size() >= MANY


def can_run(q: Tensor, *_: Any) -> str | None:
    return None if q.is_cpu else f"the tensors are on {q.device}, and it is PyTorch's attention for CPUs"


def suits(q: Tensor, k: Tensor, *others: Tensor) -> bool:
    """PyTorch's kernel loses NaN and infinity, or carries them past a mask, and divides by the sizes of its inputs."""
    return q.numel() > 0 and k.numel() > 0 and finite(q, k, *others)


def _parts(*tensors: Tensor) -> list[list[Tensor]]:
    """``[B, H, keys, D]`` each: of the clips where all of them are views of that kind, else frame by frame."""
    if all(x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2) for x in tensors):
        return [[x.flatten(1, 2).transpose(1, 2) for x in tensors]]
    return [[x[:, t].transpose(1, 2) for x in tensors] for t in range(tensors[0].shape[1])]


def _added(mask: Tensor | None, parts: int, k: Tensor) -> Sequence[Tensor | None]:
    """What is added to the scores of each part: -inf in frames that are not valid."""
    if mask is None:
        return [None] * parts
    added = torch.zeros(mask.shape, dtype=k.dtype, device=k.device).masked_fill(~mask, float("-inf"))
    return added.repeat_interleave(k.shape[2], 1)[:, None, None].tensor_split(parts, -1)


def _laid(x: Tensor, into: Tensor) -> Tensor:
    """x as it lies if it lies as ``into``, up to the strides of single entries, else copied there."""
    if all(a == b for a, b, size in zip(x.stride(), into.stride(), x.shape) if size > 1):
        return x.as_strided(into.shape, into.stride())
    return into.copy_(x)


def _nothing(mask: Tensor) -> Tensor:
    """``[B, 1, 1]``: clips without a valid frame."""
    return ~mask.any(1)[:, None, None]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if not suits(q, k, v):
        out, sums = reference.forward(q, k, v, mask, scale)
        return _laid(out, empty_dense_like(q)), sums
    parts = _parts(k, v)
    found = [
        _forward(q.transpose(1, 2), *part, attn_mask=added, scale=scale)  # [B, H, Q, D] and [B, H, Q]
        for part, added in zip(parts, _added(mask, len(parts), k))
    ]
    out, lse = found[0]
    if len(found) > 1:
        each = torch.stack([part for _, part in found])
        if mask is not None:
            each = each.masked_fill(~mask.t()[:, :, None, None], float("-inf"))
        lse = each.logsumexp(0)
        shares = (each - lse).exp().nan_to_num(0.0)[..., None]
        out = sum(share * part.nan_to_num(0.0) for share, (part, _) in zip(shares, found)).to(q.dtype)
    if mask is not None:
        out = out.masked_fill(_nothing(mask)[..., None], 0.0)
        lse = lse.masked_fill(_nothing(mask), float("-inf"))
    lse = lse.transpose(1, 2)
    return _laid(out.transpose(1, 2), empty_dense_like(q)), torch.stack([lse, torch.ones_like(lse)], -1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, sums: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of numbers that are finite; see ``suits``."""
    parts = _parts(k, v)
    rows, lse = [x.transpose(1, 2) for x in (grad, q, out)], sums[..., 0].transpose(1, 2)
    if mask is not None:
        lse = lse.masked_fill(_nothing(mask), 0.0)  # exp(-inf - 0) = 0
    grads = [
        _backward(rows[0], rows[1], *part, rows[2], lse, 0.0, False, attn_mask=added, scale=scale)
        for part, added in zip(parts, _added(mask, len(parts), k))
    ]
    dq, *others = (empty_dense_like(x) if want else grad.new_empty(0) for x, want in zip((q, k, v), wanted))
    if wanted[0]:
        dq.copy_(torch.stack([each[0] for each in grads]).sum(0, dtype=lse.dtype).transpose(1, 2))
    for i, into in enumerate(others):
        if wanted[1 + i] and len(grads) == 1:
            others[i] = _laid(grads[0][1 + i].transpose(1, 2).unflatten(1, k.shape[1:3]), into)
        elif wanted[1 + i]:
            for t, each in enumerate(grads):
                into[:, t].copy_(each[1 + i].transpose(1, 2))
    return dq, others[0], others[1]
