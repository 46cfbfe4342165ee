"""The definition of ``temporal_attention`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import accumulate_dtype
from .packing import unpacked


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int, want_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = unpacked(q, k, v)
    k, v = shifted(k, offsets), shifted(v, offsets)
    scores = torch.einsum("btnhd,bsnhd->bnhts", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    valid = visible(q.shape[1], k, mask, offsets, left, right)[:, None]  # [B, 1, H, Tq, Tk], sizes of 1 where all agree
    scores = scores.masked_fill(~valid, float("-inf"))
    probs = scores.softmax(-1).masked_fill(~valid.any(-1, keepdim=True), 0.0)  # no frame to attend to: zeros, not NaN
    out = torch.einsum("bnhts,bsnhd->btnhd", probs, v)
    lse = scores.to(accumulate_dtype(q.dtype)).logsumexp(-1).permute(0, 3, 1, 2) if want_lse else out.new_empty(0)
    return out, lse


def sources(frames: int, offset: int) -> list[int]:
    """The frame that each key of a head with this offset is read from."""
    return [min(max(s + offset, 0), frames - 1) for s in range(frames)]


def shifted(x: Tensor, offsets: Sequence[int] | None) -> Tensor:
    """The keys or values ``[B, Tk, N, H, D]`` that each head sees."""
    if not offsets:  # none, or no heads
        return x
    return torch.stack([x[:, sources(x.shape[1], offset), :, h] for h, offset in enumerate(offsets)], dim=3)


def visible(queries: int, k: Tensor, mask: Tensor | None, offsets: Sequence[int] | None, left: int, right: int) -> Tensor:
    """``[B, H, Tq, Tk]``, B and H 1 where all agree: whether the query may attend to the key."""
    keys = k.shape[1]
    step = torch.arange(keys, device=k.device) - torch.arange(queries, device=k.device)[:, None] - (keys - queries)
    valid = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=k.device)
    if left >= 0:
        valid = valid & (step >= -left)
    if right >= 0:
        valid = valid & (step <= right)
    if mask is None:
        return valid
    if not offsets:
        return valid & mask[:, None, None]
    return valid & torch.stack([mask[:, sources(keys, offset)] for offset in offsets], dim=1)[:, :, None]
