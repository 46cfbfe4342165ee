"""X-Pool's layer over frames (arXiv 2203.15086): what is linear in a video's frames is done once for each of them, not for
every pair of text and video; see ``nn.TextConditionedPool``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.folded_pool import by_frames
from .evl import PROJECTIONS
from .rules import Found, Inputs, Replacement, has_parts, not_plain, random_like

NORMS = dict.fromkeys(("layer_norm1", "layer_norm2", "layer_norm3"), nn.LayerNorm)
BY = "linear layers folded into frames"


def transformer(module: Any) -> Found:
    """``Transformer(text_embeds, video_embeds)`` of the authors' repository."""
    if not has_parts(module, cross_attn=None, linear_proj=None, dropout=None, **NORMS):
        return None
    if not has_parts(module.cross_attn, **PROJECTIONS):
        return None
    if getattr(module.cross_attn, "num_heads", None) != 1:
        return "its attention has several heads"
    layers = ("cross_attn.out_proj", "linear_proj")
    for norm in (module.layer_norm2, module.layer_norm3):
        if norm.weight is None or norm.bias is None:
            return "its norms have no weights, or no biases"
    reason = not_plain(module, "cross_attn") or not_plain(module, *layers, kind=nn.Linear)
    reason = reason or not_plain(module, "dropout", kind=nn.Dropout) or not_plain(module, "layer_norm2", kind=nn.LayerNorm)
    return reason or Replacement(_pool, BY, _inputs, uncalled=("cross_attn", *layers, "dropout", "layer_norm2"))


def _inputs(module: Any) -> Inputs:
    channels = module.linear_proj.in_features
    return random_like(module, 7, channels), random_like(module, 2, 3, channels)


def _pool(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or args[0].dim() != 2 or args[1].dim() != 3 or module.cross_attn.num_heads != 1:
        return original(*args, **kwargs)
    text, video = args
    if len(text) <= video.shape[1]:  # folding would be more arithmetic
        return original(*args)
    return by_frames(module, text, video)
