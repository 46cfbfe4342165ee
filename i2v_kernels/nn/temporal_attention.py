"""Self-attention over frames with its projections, under the names of timm; CLIP's are accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import checks, temporal_attention
from ..ops.temporal_attention.op import check_offsets, check_window

CLIP_NAMES = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj.weight": "proj.weight",
    "out_proj.bias": "proj.bias",
}


class TemporalAttention(nn.Module):
    """Multi-head self-attention of every token over the frames of its clip: ``proj(temporal_attention(qkv(x)))``.

    ``qkv.weight [3C, C]``, ``qkv.bias``, ``proj.weight [C, C]`` and ``proj.bias`` are named as in timm and TimeSformer's
    ``temporal_attn``. State dicts of ``nn.MultiheadAttention``, so those of CLIP, load as they are. The projection is read
    packed and its gradient written packed, without a copy.

    Args:
        channels: C.
        heads: H, a divisor of C.
        qkv_bias: the first projection has a bias.
        causal: a frame attends to itself and those before it.
        window: ``(left, right)``, the frames before and after it that a frame attends to; None in either place: all.
        offsets: one for each head, which then sees frame ``s + offset`` in place of frame s (ZeroI2V).

    Shape: ``[B, T, N, C]`` to the same. ``forward(x, mask=None, bias=None)``: ``mask [B, T]`` is True where a frame is valid,
    ``bias [H, T, T]`` is added to the scores.

    Raises:
        ValueError: heads does not divide channels; x has other than C channels.

    Examples:
        >>> import torch
        >>> attention = TemporalAttention(768, heads=12)
        >>> attention(torch.randn(2, 8, 197, 768)).shape
        torch.Size([2, 8, 197, 768])
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        qkv_bias: bool = True,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        name = "TemporalAttention"
        checks.integer(name, "channels", channels, low=1)
        checks.flag(name, "qkv_bias", qkv_bias)
        checks.flag(name, "causal", causal)
        check_window(name, window)
        if checks.integer(name, "heads", heads) < 1 or channels % heads:
            raise ValueError(f"TemporalAttention: heads={heads} must divide channels={channels}")
        if offsets is not None:
            offsets = check_offsets(name, offsets, heads)
        self.channels, self.heads, self.causal, self.window, self.offsets = channels, heads, causal, window, offsets
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if x.dim() != 4 or x.shape[3] != self.channels:
            raise ValueError(f"TemporalAttention: x.shape={tuple(x.shape)}, but [B, T, N, {self.channels}] is needed")
        options: dict[str, Any] = {"causal": self.causal, "window": self.window, "offsets": self.offsets}
        qkv = self.qkv(x).unflatten(3, (3, self.heads, -1))
        return self.proj(temporal_attention(qkv, mask=mask, bias=bias, **options).flatten(3))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Modules load before their children, from the same dict: what is renamed here, qkv and proj find.
        for clip, timm in CLIP_NAMES.items():
            if prefix + clip in state_dict:
                state_dict[prefix + timm] = state_dict.pop(prefix + clip)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        options = {"causal": self.causal or None, "window": self.window, "offsets": self.offsets}
        named = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return f"{self.channels}, heads={self.heads}{named}"
