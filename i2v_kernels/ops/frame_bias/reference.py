"""The definition of ``frame_bias`` in plain PyTorch; every backend is judged against it in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    q: Tensor, k: Tensor, weight_previous: Tensor, weight_next: Tensor, height: int, width: int, prefix: int, scale: float
) -> Tensor:
    patches_q, patches_k = q[:, :, prefix:], k[:, :, prefix:]
    index = relative_index(height, width, q.device)
    previous = _half(patches_q[:, 1:], patches_k[:, :-1], weight_previous[index], scale)
    following = _half(patches_q[:, :-1], patches_k[:, 1:], weight_next[index], scale)
    return F.pad(previous, (0, 0, prefix, 0, 1, 0)) + F.pad(following, (0, 0, prefix, 0, 0, 1))


def _half(q: Tensor, k: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Attention of each frame of q to one frame of k, its mean over heads times ``weight [P, P, C]``."""
    scores = torch.einsum("btqhd,btkhd->bthqk", q, k) * scale
    return torch.einsum("btqk,qkc->btqc", scores.softmax(-1).mean(2), weight)


def relative_index(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """``[P, P]``: the row of the weights for a query and a key of the patch grid."""
    place = torch.arange(height * width, device=device)
    row, column = place // width, place % width
    rows = row[:, None] - row[None, :] + height - 1
    return rows * (2 * width - 1) + column[:, None] - column[None, :] + width - 1
