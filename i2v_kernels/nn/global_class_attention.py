"""DiscoVLA's attention, whose class tokens see the whole clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks, frame_attention, lora_linear
from .frame_attention import FrameAttention
from .tokens import QuickGELU, joined


class GlobalClassAttention(FrameAttention):
    """Attention of DiscoVLA (arXiv 2506.08887), ``Attention`` of ``module_GlobalCLS`` in its code, under the same names.

    Tokens attend to their own frame. A class token does so, then goes through a bottleneck of QuickGELU; to this is added
    what it finds among all tokens of the clip. The projection of q, k and v has a low-rank update.

    ``in_proj_weight``, ``in_proj_bias`` and ``out_proj`` are CLIP's; ``TVPt_LoRA_a [R, C]``, ``TVPt_LoRA_b [3C, R]``,
    ``TVPt_down_weight [R, C]``, ``TVPt_down_bias``, ``TVPt_up_weight [C, R]`` and ``TVPt_up_bias`` learn. The second of each
    pair begins at zero.

    Args:
        channels: C.
        heads: H, a divisor of C.
        rank: R, of the update and of the bottleneck.

    Shape: ``[B, T, N, C]``, the class token first, to the same.

    Examples:
        >>> import torch
        >>> attention = GlobalClassAttention(768, heads=12, rank=8)
        >>> attention(torch.randn(2, 8, 50, 768)).shape
        torch.Size([2, 8, 50, 768])
    """

    def __init__(self, channels: int, heads: int, rank: int = 8) -> None:
        super().__init__(channels, heads)
        checks.integer("GlobalClassAttention", "rank", rank, low=1)
        self.TVPt_LoRA_a, self.TVPt_LoRA_b = _parameter(rank, channels), _parameter(3 * channels, rank)
        self.TVPt_down_weight, self.TVPt_down_bias = _parameter(rank, channels), _parameter(rank)
        self.TVPt_activate = QuickGELU()
        self.TVPt_up_weight, self.TVPt_up_bias = _parameter(channels, rank), _parameter(channels)
        nn.init.kaiming_uniform_(self.TVPt_LoRA_a, a=5**0.5)
        nn.init.xavier_uniform_(self.TVPt_down_weight)
        nn.init.normal_(self.TVPt_down_bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self._check("x", x)
        qkv, *_ = self.project(x)
        q, k, v = qkv.unbind(3)
        out = self.output(frame_attention(qkv, frames=(0,)))
        token, rest = out.split([1, out.shape[2] - 1], dim=2)
        token = self.TVPt_activate(F.linear(token, self.TVPt_down_weight, self.TVPt_down_bias))
        token = F.linear(token, self.TVPt_up_weight, self.TVPt_up_bias)
        token = token + self.output(frame_attention(q[:, :, :1], k, v, frames="all"))
        return joined([token, rest], out)

    def _packed(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.in_proj_weight, self.TVPt_LoRA_a, self.TVPt_LoRA_b, self.in_proj_bias)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))
