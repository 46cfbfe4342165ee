"""The definition of ``token_shift`` in plain PyTorch; every backend is judged against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor,
    channels: Sequence[int],
    offsets: Sequence[int],
    padding: str,
    start: int,
    stop: int,
    step: int = 1,
    residual: bool = False,
) -> Tensor:
    out = x.clone()
    shift_in_place(out, channels, offsets, padding, start, stop, step)
    return x + out if residual else out


def shift_in_place(
    x: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int, step: int
) -> None:
    """``token_shift_``: nothing is written but the channels and tokens that are shifted."""
    frames = x.shape[1]
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
        part.copy_(moved)
        first += count


def adjoint(
    grad: Tensor,
    channels: Sequence[int],
    offsets: Sequence[int],
    padding: str,
    start: int,
    stop: int,
    step: int = 1,
    residual: bool = False,
) -> Tensor:
    """The transpose of the definition, in plain PyTorch: each frame's gradient goes back to where its value came from."""
    frames = grad.shape[1]
    out = grad.clone()
    first = 0
    for count, offset in zip(channels, offsets):
        source = torch.arange(frames, device=grad.device) - offset
        part = grad[:, :, start:stop:step, first : first + count]
        into = torch.zeros_like(part)
        if padding == "zeros":
            inside = (source >= 0) & (source < frames)
            part, source = part[:, inside], source[inside]
        source = source % max(frames, 1) if padding == "wrap" else source.clamp(0, max(frames - 1, 0))
        out[:, :, start:stop:step, first : first + count] = into.index_add_(1, source, part)
        first += count
    return grad + out if residual else out
