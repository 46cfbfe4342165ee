"""Vita-CLIP's block, whose tokens attend to prompts too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import checks
from .frame_attention import FrameAttention
from .tokens import in_order, perceptron


class VideoPromptBlock(nn.Module):
    """A block of Vita-CLIP (arXiv 2304.03307), ``TransformerEncoderLayer`` in its code, under the same names.

    Tokens of a frame attend to that frame and to prompts, which are keys and values of this block alone: one summary token
    of the frame, made of the class tokens of all; local prompts, one made of every frame's class token, all of which go to
    every frame; global prompts, the same for all clips, which the model keeps and gives to each of its blocks. The published
    code joins them to the tokens, and drops what it computes for them, that of the perceptron on global prompts included.

    ``attn``, ``mlp.fc1``, ``mlp.fc2``, ``norm1``, ``norm2``; ``cls_proj``, ``summary_ln``, ``summary_attn_layer``;
    ``local_prompts [1, T, C]``. Attention has ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``; ``act`` is QuickGELU.

    Args:
        channels: C.
        heads: H, a divisor of C.
        frames: T, of the local prompts.
        summary, local: with a summary token, with local prompts.

    Shape: ``[B, T, N, C]``, the class token first, to the same. ``forward(x, global_prompts=None)``: ``[G, C]``.

    Raises:
        ValueError: heads does not divide channels; x has other frames than there are local prompts.

    Examples:
        >>> import torch
        >>> block = VideoPromptBlock(768, heads=12, frames=8)
        >>> block(torch.randn(2, 8, 197, 768), global_prompts=torch.randn(8, 768)).shape
        torch.Size([2, 8, 197, 768])
    """

    def __init__(self, channels: int, heads: int, frames: int = 8, summary: bool = True, local: bool = True) -> None:
        super().__init__()
        name = "VideoPromptBlock"
        self.attn = FrameAttention(channels, heads, published="transformers")  # refuses what does not fit
        self.frames = checks.integer(name, "frames", frames, low=1)
        self.summary, self.local = checks.flag(name, "summary", summary), checks.flag(name, "local", local)
        self.mlp = perceptron(channels, "fc1", "act", "fc2")
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        for name, parameter in self.mlp.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.normal_(parameter, std=1e-6)
        if summary or local:
            self.cls_proj = nn.Linear(channels, channels)
        if summary:
            self.summary_ln = nn.LayerNorm(channels)
            self.summary_attn_layer = FrameAttention(channels, heads, "all", published="transformers")
        if local:
            bound = (6 / (3 * 16 * 16 + channels)) ** 0.5  # as published, for patches of 16 x 16
            self.local_prompts = nn.Parameter(torch.empty(1, frames, channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, global_prompts: Tensor | None = None) -> Tensor:
        prompts = []
        if self.summary or self.local:
            own = self.cls_proj(x[:, :, :1])  # [B, T, 1, C]
        if self.summary:
            prompts.append(own + self.summary_attn_layer(self.summary_ln(own)))
        if self.local:
            if x.shape[1] != self.frames:
                raise ValueError(
                    f"VideoPromptBlock: x.shape={tuple(x.shape)}, but there are local prompts for {self.frames} frames"
                )
            prompts.append((self.local_prompts[:, :, None] + own).transpose(1, 2))  # [B, 1, T, C]
        if global_prompts is not None:
            prompts.append(global_prompts[None, None])
        x = x + self.attn(in_order(self.norm1, x), [self.norm1(prompt) for prompt in prompts])
        return x + in_order(lambda tokens: self.mlp(self.norm2(tokens)), x)
