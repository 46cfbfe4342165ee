"""The definition of ``frame_attention`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..temporal_attention.packing import unpacked
from .frames import head_groups, sources


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, extra_k: Tensor | None, extra_v: Tensor | None, mask: Tensor | None,
    offsets: Sequence[int], counts: Sequence[int], edges: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = unpacked(q, k, v)
    outs, lses = [], []
    for first, last, own in head_groups(offsets, counts, q.shape[3]):
        tensors: list[Any] = [None if x is None else x[:, :, :, first:last] for x in (q, k, v, extra_k, extra_v)]
        out, lse = attend(*tensors, mask, own, edges, scale)  # type: ignore[call-arg]
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=3), torch.cat(lses, dim=3)


def attend(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, mask: Tensor | None,
    offsets: Sequence[int], edges: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Heads that attend to the same frames."""
    batch, frames, tokens = k.shape[:3]
    table = torch.tensor(sources(frames, offsets, edges), device=k.device)  # [T, F]
    outside = (table < 0).expand(batch, *table.shape)
    table = table.clamp(min=0)
    seen = ~outside if mask is None else mask[:, table] & ~outside  # [B, T, F]: keys and values that are there
    valid = seen | outside if edges == "zero" else seen

    def gathered(x: Tensor) -> Tensor:
        return x[:, table].masked_fill(~seen[..., None, None, None], 0.0).flatten(2, 3)  # [B, T, F * L, H, D]

    keys, values = gathered(k), gathered(v)
    valid = valid[..., None].expand(*valid.shape, tokens).flatten(2)
    if extra_k is not None and extra_v is not None:
        keys, values = torch.cat([keys, extra_k], dim=2), torch.cat([values, extra_v], dim=2)
        valid = torch.cat([valid, valid.new_ones(*extra_k.shape[:3])], dim=2)
    valid = valid[:, :, None, None]  # [B, T, 1, 1, keys]
    scores = (torch.einsum("btqhd,btkhd->bthqk", q, keys) * scale).masked_fill(~valid, float("-inf"))
    # no key to attend to: zeros, not NaN
    probs = scores.softmax(-1).masked_fill(~valid, 0.0)
    out = torch.einsum("bthqk,btkhd->btqhd", probs, values)
    scores = scores.to(accumulate_dtype(q.dtype))
    lse = scores.logsumexp(-1) if scores.shape[-1] > 0 else scores.sum(-1) - float("inf")
    return out, lse.transpose(2, 3)
