"""Attention of frames to whole frames with its projections, under the names of published code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks
from ..ops.frame_attention import frame_attention
from ..ops.frame_attention.op import EDGES, Frames, check_frames
from ..ops.temporal_attention.packing import unpacked
from .tokens import in_order

NAMES = ("clip", "transformers", "timm")


class FrameAttention(nn.Module):
    """Multi-head self-attention of each frame's tokens to whole frames: ``i2v_kernels.frame_attention`` between projections.

    Further tokens of a frame, of its clip or of all clips take part as keys and values alone: they are neither joined to the
    others nor ask anything themselves. Tokens stay in their order in memory.

    Args:
        channels: C.
        heads: H, a divisor of C.
        frames, edges: see ``i2v_kernels.frame_attention``.
        published: the names of the parameters. "clip": ``in_proj_weight [3C, C]``, ``in_proj_bias``, ``out_proj``, those of
            ``nn.MultiheadAttention`` and so of CLIP, X-CLIP, Open-VCLIP and ZeroI2V. "transformers": ``q_proj``, ``k_proj``,
            ``v_proj``, ``out_proj``, also Vita-CLIP's and CLIP-ViP's. "timm": ``qkv``, ``proj``, also TimeSformer's. Weights
            begin as Xavier's and biases at zero, but timm's as those of ``nn.Linear``.

    Shape: ``[B, T, N, C]`` to the same. ``forward(x, extra=None, mask=None)``: ``extra`` is ``[B, T, M, C]`` or several such
    tensors, with 1 in place of B or T where tokens are common; ``mask [B, T]`` is True where a frame is valid as keys.

    Raises:
        ValueError: heads does not divide channels; x or extra has other than 4 dimensions or C channels.

    Examples:
        >>> import torch
        >>> attention = FrameAttention.open_vclip(768, heads=12)
        >>> attention(torch.randn(2, 8, 197, 768)).shape
        torch.Size([2, 8, 197, 768])
        >>> prompts = torch.randn(1, 1, 8, 768)
        >>> FrameAttention(768, 12)(torch.randn(2, 8, 197, 768), prompts).shape
        torch.Size([2, 8, 197, 768])
    """

    def __init__(self, channels: int, heads: int, frames: Frames = (0,), edges: str = "mask", published: str = "clip") -> None:
        super().__init__()
        name = type(self).__name__
        checks.integer(name, "channels", channels, low=1)
        if checks.integer(name, "heads", heads) < 1 or channels % heads:
            raise ValueError(f"{name}: heads={heads} must divide channels={channels}")
        check_frames(frames, heads)
        checks.one_of(name, "edges", edges, EDGES)
        checks.one_of(name, "published", published, NAMES)
        self.channels, self.heads, self.frames, self.edges, self.published = channels, heads, frames, edges, published
        if published == "timm":
            self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
            return
        if published == "clip":
            self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.out_proj = nn.Linear(channels, channels)
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @staticmethod
    def open_vclip(channels: int, heads: int, reach: int = 1) -> FrameAttention:
        """Open-VCLIP (arXiv 2302.00624), its "expand_temporal_view": up to ``reach`` frames each way, 1 to 3 in its code.

        Frames outside the clip are keys and values of zero within the softmax, made behind the projections: so the bias of the
        keys is not the constant there that it is elsewhere, and learns.
        """
        checks.integer("FrameAttention", "reach", reach, low=0)
        return FrameAttention(channels, heads, tuple(range(-reach, reach + 1)), "zero")

    @staticmethod
    def zeroi2v(channels: int, heads: int, n_div: int = 12) -> FrameAttention:
        """ZeroI2V (2310.01324): the first ``H/n_div`` heads read the frame before, as many the next, the others their own.

        A frame without neighbour reads its own. The published code shifts ``C/n_div`` channels of keys and values, which are
        whole heads here; ``TokenShift.zeroi2v`` shifts others.
        """
        name = "FrameAttention"
        checks.integer(name, "channels", channels, low=1)
        checks.integer(name, "heads", heads, low=1)
        if checks.integer(name, "n_div", n_div) < 2 or heads % n_div:
            raise ValueError(f"{name}: n_div={n_div} must be at least 2 and divide heads={heads}: heads are shifted whole")
        fold = heads // n_div
        return FrameAttention(channels, heads, [(-1,)] * fold + [(1,)] * fold + [(0,)] * (heads - 2 * fold), "clamp")

    def forward(self, x: Tensor, extra: Tensor | Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        self._check("x", x)
        q, k, v = self.project(x)
        return self.output(frame_attention(q, k, v, frames=self.frames, edges=self.edges, extra=self._keys(extra), mask=mask))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``[..., C]`` to q, k and v ``[..., H, D]``, or all in one ``[..., 3, H, D]``."""
        if self.published == "transformers":
            q, k, v = (in_order(layer, x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
            return q, k, v
        return self._packed(x).unflatten(-1, (3, self.heads, -1)), None, None

    def output(self, mixed: Tensor) -> Tensor:
        """``[..., H, D]`` to ``[..., C]``."""
        return in_order(self.proj if self.published == "timm" else self.out_proj, mixed.flatten(-2))

    def _packed(self, x: Tensor) -> Tensor:
        if self.published == "timm":
            return in_order(self.qkv, x)
        return in_order(lambda tokens: F.linear(tokens, self.in_proj_weight, self.in_proj_bias), x)

    def _keys(self, extra: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values of further tokens; those of several tensors one after the other."""
        tokens = [extra] if isinstance(extra, Tensor) else list(extra or ())
        for x in tokens:
            self._check("extra", x)
        if not tokens:
            return None
        keys = [unpacked(*self.project(x))[1:] for x in tokens]
        if len(keys) == 1:
            return keys[0]
        clips, frames = (max(x.shape[axis] for x in tokens) for axis in (0, 1))
        k, v = (torch.cat([x.expand(clips, frames, -1, -1, -1) for x in each], dim=2) for each in zip(*keys))
        return k, v

    def _check(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: {name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[3] != self.channels:
            layout = f"[B, T, {'M' if name == 'extra' else 'N'}, {self.channels}]"
            raise ValueError(f"{type(self).__name__}: {name}.shape={tuple(x.shape)}, but {layout} is needed")

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, frames={self.frames}, edges={self.edges!r}"
