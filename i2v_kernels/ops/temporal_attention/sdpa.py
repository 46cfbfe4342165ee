"""The route for long clips: PyTorch's ``scaled_dot_product_attention``, clip after clip, on views that copy nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..base import accumulate_dtype
from . import reference
from .packing import unpacked
from .reference import shifted, visible


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int, want_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    function = fused if finite(q, k, v, bias) else clip_after_clip
    return function(q, k, v, bias, mask, offsets, scale, left, right, want_lse)


def fused(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int, want_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0:
        return reference.forward(q, k, v, bias, mask, offsets, scale, left, right, want_lse)
    q, k, v = unpacked(q, k, v)
    k, v = shifted(k, offsets), shifted(v, offsets)
    allowed = None
    if mask is not None or left >= 0 or right >= 0:
        allowed = visible(q.shape[1], k, mask, offsets, left, right)
    if bias is not None:
        bias = bias.to(q.dtype)
    clips = []
    for b in range(q.shape[0]):
        seen = None if allowed is None else allowed[b if allowed.shape[0] > 1 else 0]  # [1 or H, Tq, Tk]
        added = seen if bias is None else bias if seen is None else bias.masked_fill(~seen, float("-inf"))
        q_b, k_b, v_b = (x[b].permute(1, 2, 0, 3) for x in (q, k, v))  # [N, H, T, D]
        out = F.scaled_dot_product_attention(q_b, k_b, v_b, attn_mask=added, scale=scale)
        if seen is not None:  # backends differ in what a query gives that may look at nothing
            out = out.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        clips.append(out.permute(2, 0, 1, 3))
    return torch.stack(clips), q.new_empty(0)


def by_products(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by PyTorch's matrix products: its fused kernels have a first gradient and no other."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(q, k, v, bias, mask, offsets, scale, left, right)


def finite(*tensors: Tensor | None) -> bool:
    """Whether all numbers are, on a CPU: PyTorch's kernel there loses NaN and infinity, or carries them past a mask. A GPU
    is not asked, for that would wait for it. Told by sums, in a fortieth of the time of ``isfinite().all()``; one that
    overflows says no, which costs time and nothing else.
    """
    return all(x is None or not x.is_cpu or bool(x.sum(dtype=accumulate_dtype(x.dtype)).isfinite()) for x in tensors)


def clip_after_clip(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int, want_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, with the scores of one clip at a time."""
    clips = []
    for b in range(q.shape[0]):
        q_b, k_b, v_b, mask_b = (None if x is None else x[b : b + 1] for x in (q, k, v, mask))
        clips.append(reference.forward(q_b, k_b, v_b, bias, mask_b, offsets, scale, left, right, False)[0])  # type: ignore[arg-type]
    return torch.cat(clips), q.new_empty(0)
