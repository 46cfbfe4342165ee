"""The definition of ``token_shift`` in plain PyTorch; every backend is judged against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int, step: int,
    residual: bool,
) -> Tensor:  # fmt: skip
    frames = x.shape[1]
    out = x.clone()
    first = 0
    for count, offset in zip(channels, offsets):
        source = torch.arange(frames, device=x.device) - offset
        part = x[:, :, start:stop:step, first : first + count]
        if padding == "wrap":
            moved = part[:, source % max(frames, 1)]
        else:
            moved = part[:, source.clamp(0, max(frames - 1, 0))]
            if padding == "zeros":
                outside = (source < 0) | (source >= frames)
                moved = moved.masked_fill(outside[:, None, None], 0)
        out[:, :, start:stop:step, first : first + count] = moved
        first += count
    return x + out if residual else out


def adjoint(
    grad: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int, step: int,
    residual: bool,
) -> Tensor:  # fmt: skip
    """The transpose of the definition, in plain PyTorch: each frame's gradient goes back to where its value came from."""
    frames = grad.shape[1]
    out = grad.clone()
    first = 0
    for count, offset in zip(channels, offsets):
        source = torch.arange(frames, device=grad.device) - offset
        part = grad[:, :, start:stop:step, first : first + count]
        if padding == "zeros":
            inside = (source >= 0) & (source < frames)
            part, source = part[:, inside], source[inside]
        source = source % max(frames, 1) if padding == "wrap" else source.clamp(0, max(frames - 1, 0))
        moved = torch.zeros_like(grad[:, :, start:stop:step, first : first + count]).index_add_(1, source, part)
        out[:, :, start:stop:step, first : first + count] = moved
        first += count
    return grad + out if residual else out
