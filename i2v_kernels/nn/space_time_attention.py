"""TimeSformer's attention within frames and over a whole clip, with one class token for each clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import checks, frame_attention
from .frame_attention import FrameAttention

TYPES = ("divided_space_time", "joint_space_time")


class SpaceTimeAttention(FrameAttention):
    """TimeSformer's (arXiv 2102.05095) spatial half of divided attention, or joint attention.

    Divided: patches attend to their frame and to the class token of the clip; the class token attends to itself and to each
    frame in turn, and the mean over frames is taken. Joint: all tokens attend to all. ``TemporalAttention`` is the temporal
    half. The published code repeats the class token for each frame and moves patches to frames and back.

    Parameters are ``qkv`` and ``proj``, as of ``blocks.i.attn`` there.

    Args:
        channels: C.
        heads: H, a divisor of C.
        attention_type: "divided_space_time" or "joint_space_time".

    Shape: ``[B, 1 + P * T, C]``, a class token and then each patch with its T frames together, to the same.
    ``forward(x, frames)``: T.

    Raises:
        ValueError: heads does not divide channels; T does not divide the patches; an unknown type.

    Examples:
        >>> import torch
        >>> attention = SpaceTimeAttention(768, heads=12)
        >>> attention(torch.randn(2, 1 + 196 * 8, 768), frames=8).shape
        torch.Size([2, 1569, 768])
    """

    def __init__(self, channels: int, heads: int, attention_type: str = "divided_space_time") -> None:
        super().__init__(channels, heads, published="timm")
        checks.one_of("SpaceTimeAttention", "attention_type", attention_type, TYPES)
        self.attention_type = attention_type

    def forward(self, x: Tensor, frames: int) -> Tensor:  # type: ignore[override]
        checks.integer("SpaceTimeAttention", "frames", frames, low=1)
        if x.dim() != 3 or x.shape[2] != self.channels or x.shape[1] < 1 or (x.shape[1] - 1) % frames:
            layout = f"[B, 1 + P * {frames}, {self.channels}]"
            raise ValueError(f"SpaceTimeAttention: x.shape={tuple(x.shape)}, but {layout} is needed")
        qkv, *_ = self.project(x)  # [B, 1 + P * T, 3, H, D]
        if self.attention_type == "joint_space_time":
            return self.output(frame_attention(qkv[:, None], frames=(0,))[:, 0])
        token, patches = qkv.split([1, qkv.shape[1] - 1], dim=1)
        patches = patches.unflatten(1, (-1, frames)).transpose(1, 2)  # [B, T, P, 3, H, D]
        q, *common = token[:, None].unbind(3)  # [B, 1, 1, H, D]
        mixed = frame_attention(patches, frames=(0,), extra=common)
        _, k, v = patches.unbind(3)
        token = frame_attention(q.expand(-1, frames, -1, -1, -1), k, v, frames=(0,), extra=common).mean(1)
        return self.output(torch.cat([token, mixed.transpose(1, 2).flatten(1, 2)], dim=1))

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, attention_type={self.attention_type!r}"
