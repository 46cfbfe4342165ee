"""The definition of ``late_interaction`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import accumulate_dtype


def forward(
    text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None, text_mask: Tensor | None,
    video_mask: Tensor | None, both: bool, zero: bool, temperature: float, unit: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not zero:  # so that NaN there does not matter, to gradients neither
        text, video = (
            x if m is None else x.masked_fill(~m[..., None], 0.0) for x, m in ((text, text_mask), (video, video_mask))
        )
    s = torch.einsum("atd,bvd->abtv", text, video).to(accumulate_dtype(text.dtype))
    rows = None if text_mask is None else text_mask[:, None, :, None]
    columns = None if video_mask is None else video_mask[None, :, None, :]
    if zero:
        for mask in (rows, columns):
            s = s if mask is None else s * mask
        rows = columns = None
    found, text_best = sought(s, 3, columns, temperature, unit)  # [A, V, Nt]
    scores = summed(found, text_weight, None if rows is None else rows[..., 0], 1)
    video_best = s.new_empty(0, dtype=torch.uint8)
    if both:
        found, video_best = sought(s, 2, rows, temperature, unit)  # [A, V, Nv]
        scores = (scores + summed(found, video_weight, None if columns is None else columns[:, :, 0], 0)) / 2
    none = s.new_empty(0, dtype=torch.uint8)
    return (scores, text_best, video_best) if keep else (scores, none, none)


def sought(s: Tensor, dim: int, valid: Tensor | None, temperature: float, unit: bool) -> tuple[Tensor, Tensor]:
    """Over ``dim`` of ``s [A, V, Nt, Nv]``, where ``valid``: maxima, or means weighted by a softmax, and the places of maxima.
    Zeros where nothing is valid.
    """
    if 0 in s.shape[2:]:
        return s.sum(dim), s.new_empty(0, dtype=torch.uint8)
    if temperature:
        found, best = attended(s, dim, valid, temperature, unit), s.new_empty(0, dtype=torch.uint8)
    else:
        found, best = (s if valid is None else s.masked_fill(~valid, float("-inf"))).max(dim)
        best = best.to(place_dtype(s.shape[dim]))
    return found if valid is None else found.masked_fill(~valid.any(dim), 0.0), best


def attended(s: Tensor, dim: int, valid: Tensor | None, temperature: float, unit: bool) -> Tensor:
    """``sum softmax(s / temperature) * s``; with ``unit`` the softmax is that of s divided by its length."""
    if valid is not None:
        s = s.masked_fill(~valid, 0.0)
    logits = torch.nn.functional.normalize(s, dim=dim) if unit else s
    logits = logits / temperature
    if valid is not None:
        logits = logits.masked_fill(~valid, float("-inf"))
    return (logits.softmax(dim) * s).sum(dim)


def summed(found: Tensor, weight: Tensor | None, valid: Tensor | None, dim: int) -> Tensor:
    """``[A, V]``: the sum over ``found [A, V, tokens]``, where ``valid``, times weights, which are the same along ``dim``."""
    if valid is not None:
        found = found.masked_fill(~valid, 0.0)
    return (found if weight is None else found * weight.unsqueeze(dim)).sum(-1)


def place_dtype(tokens: int) -> torch.dtype:
    """The smallest dtype that counts so many tokens."""
    return torch.uint8 if tokens <= 256 else torch.int16 if tokens <= 32768 else torch.int32
