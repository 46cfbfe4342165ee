"""EVL's attention between frames as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import checks, frame_bias


class TemporalCrossAttention(nn.Module):
    """``i2v_kernels.frame_bias`` with learned weights: what EVL (arXiv 2208.03550) adds to the features of its frames.

    The parameters ``w1``, of the previous frame, and ``w2``, of the next one, ``[(2 * H - 1) * (2 * W - 1), C]``, have the
    names, shapes and zeros that the published class of this name has, so state dicts pass both ways.

    Args:
        channels: of the features, C.
        grid: ``(H, W)``, the patch grid.
        prefix: number of class tokens before the patches.

    Shape: q and k of a layer of the image model, ``[B, T, N, heads, D]``, to ``[B, T, N, C]``, zero for the prefix tokens.

    Examples:
        >>> import torch
        >>> attention = TemporalCrossAttention(768, (14, 14))
        >>> q, k = torch.randn(2, 1, 4, 197, 12, 64)
        >>> attention(q, k).shape
        torch.Size([1, 4, 197, 768])
    """

    def __init__(self, channels: int = 768, grid: tuple[int, int] = (14, 14), prefix: int = 1) -> None:
        super().__init__()
        name = "TemporalCrossAttention"
        checks.integer(name, "channels", channels, low=1)
        height, width = checks.sizes(name, "grid", grid, "H, W", low=1)
        self.grid, self.prefix = (height, width), checks.integer(name, "prefix", prefix, low=0)
        places = (2 * height - 1) * (2 * width - 1)
        self.w1 = nn.Parameter(torch.zeros(places, channels))
        self.w2 = nn.Parameter(torch.zeros(places, channels))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return frame_bias(q, k, self.w1, self.w2, grid=self.grid, prefix=self.prefix)

    def extra_repr(self) -> str:
        return f"{self.w1.shape[1]}, grid={self.grid}, prefix={self.prefix}"
