"""CLIP-ViP's attention, whose few proxy tokens see the whole clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import checks, frame_attention
from .frame_attention import FrameAttention


class ProxyAttention(FrameAttention):
    """Attention of CLIP-ViP (arXiv 2209.06430, eq. 2), ``CLIPAttention.forward2`` in its code, under the same names.

    A clip has M proxy tokens, its class token among them, which attend to all tokens of the clip; the P patches of a frame
    attend to that frame and to the proxies, which are read where they lie: nothing is repeated for each frame.

    Parameters are ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Args:
        channels: C.
        heads: H, a divisor of C.

    Shape: ``[B, M + T * P, C]``, proxies first, then frame after frame, to the same. ``forward(x, size)``: ``(M, T, P)``.

    Raises:
        ValueError: heads does not divide channels; x is of another shape than size says.

    Examples:
        >>> import torch
        >>> attention = ProxyAttention(768, heads=12)
        >>> attention(torch.randn(2, 4 + 8 * 196, 768), (4, 8, 196)).shape
        torch.Size([2, 1572, 768])
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads, published="transformers")

    def forward(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:  # type: ignore[override]
        proxies, frames, patches = checks.sizes("ProxyAttention", "size", size, "M, T, P")
        if x.dim() != 3 or x.shape[1:] != (proxies + frames * patches, self.channels):
            layout = f"[B, M + T * P, {self.channels}]"
            raise ValueError(f"ProxyAttention: x.shape={tuple(x.shape)} and size={size}, but {layout} is needed")
        return self.output(proxy_attention(*self.project(x), proxies, frames))  # type: ignore[arg-type]


def proxy_attention(q: Tensor, k: Tensor, v: Tensor, proxies: int, frames: int, scale: float | None = None) -> Tensor:
    """CLIP-ViP's attention of ``[B, M + T * P, H, D]``: to the same."""
    # split and cat: each the other's gradient, one copy a way
    parts = [x.split([proxies, x.shape[1] - proxies], dim=1) for x in (q, k, v)]
    own = [patches.unflatten(1, (frames, -1)) for _, patches in parts]  # [B, T, P, H, D]
    common = parts[1][0][:, None], parts[2][0][:, None]  # [B, 1, M, H, D]
    # the proxies first: of what is computed later, the larger part, the gradients come first, when there are no others yet
    of_clip = frame_attention(parts[0][0][:, None], k[:, None], v[:, None], frames=(0,), scale=scale)[:, 0]
    of_frames = frame_attention(*own, frames=(0,), extra=common, scale=scale).flatten(1, 2)
    return torch.cat([of_clip, of_frames], dim=1)
