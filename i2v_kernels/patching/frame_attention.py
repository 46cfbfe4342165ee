"""Attention into other frames: Open-VCLIP's and CLIP-ViP's, of the authors' repositories; X-CLIP's is in ``clip_blocks.py``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.proxy_attention import proxy_attention
from ..ops.frame_attention import frame_attention
from .attention import unlike_clip
from .rules import Found, Inputs, Replacement, drops, has_parts, not_plain, random_like

REACH = {"expand_temporal_view": 1, "expand_temporal_view_step2": 2, "expand_temporal_view_step3": 3}
PROJECTIONS = {f"{name}_proj": nn.Linear for name in ("q", "k", "v", "out")}


def open_vclip(module: Any) -> Found:
    """Open-VCLIP's ``MultiheadAttention`` on ``[L, B * T, C]``: windows of 3, 5 or 7 frames, zero keys outside the clip."""
    shift = getattr(module, "temporal_shift", None)
    if not isinstance(shift, str) or not isinstance(getattr(module, "T", None), int) or not has_parts(module, out_proj=None):
        return None
    if shift == "channel_shift":
        return "its channel_shift leaves channels and tokens mixed up, which is kept as published"
    if shift not in REACH:
        return f"its temporal_shift is {shift!r}"
    if module.batch_first:
        return "its attention is batch_first"
    by = "frame_attention, windows of frames read where they lie"
    return (
        unlike_clip(module)
        or not_plain(module, "out_proj")
        or Replacement(_open_vclip, by, _window_inputs, uncalled=("out_proj",), reads=("T", "dropout"))
    )


def _window_inputs(module: Any) -> Inputs:
    x = random_like(module, 5, 2 * module.T, module.embed_dim)
    return x, x, x, None, False


def _open_vclip(
    attn: Any,
    original: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
) -> Any:
    if (
        not (query is key is value)
        or query.dim() != 3
        or query.shape[1] % attn.T
        or need_weights
        or key_padding_mask is not None
        or attn_mask is not None
        or drops(attn, attn.dropout)
    ):
        return original(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights)
    reach = REACH[attn.temporal_shift]
    return attend(attn, query, attn.T, frames=tuple(range(-reach, reach + 1)), edges="zero"), None


def attend(attn: Any, x: Tensor, frames_of_a_clip: int, extra: Tensor | None = None, **options: Any) -> Tensor:
    """``frame_attention`` between CLIP's projections: ``x [L, B * T, C]``, with ``extra [M, B * T, C]`` as further keys."""

    def packed(tokens: Tensor) -> Tensor:  # a view of [L, B * T, 3C]
        qkv = F.linear(tokens, attn.in_proj_weight, attn.in_proj_bias).unflatten(2, (3, attn.num_heads, -1))
        return qkv.unflatten(1, (-1, frames_of_a_clip)).permute(1, 2, 0, 3, 4, 5)  # [B, T, L, 3, H, D]

    more: Any = None if extra is None else packed(extra).unbind(3)[1:]
    mixed = frame_attention(packed(x), extra=more, **options)
    return F.linear(mixed.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2), attn.out_proj.weight, attn.out_proj.bias)


def clip_vip(module: Any) -> Found:
    """CLIP-ViP's ``CLIPAttention``, where it is given a size ``(M, T, P)``: ``[B, M + T * P, C]``."""
    if not has_parts(module, **PROJECTIONS) or not callable(getattr(module, "forward2", None)):
        return None
    by = "frame_attention, proxy tokens read where they lie"
    return Replacement(_clip_vip, by, _proxy_inputs, reads=("dropout",))


def _proxy_inputs(module: Any) -> Inputs:
    return random_like(module, 2, 2 + 3 * 4, module.q_proj.in_features), (2, 3, 4)


def _clip_vip(
    module: Any,
    original: Any,
    hidden_states: Tensor,
    inputs_size: Any,
    attention_mask: Tensor | None = None,
    causal_attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> Any:
    if (
        inputs_size is None
        or hidden_states.dim() != 3
        or hidden_states.shape[1] != inputs_size[0] + inputs_size[1] * inputs_size[2]
        or attention_mask is not None
        or causal_attention_mask is not None
        or output_attentions
        or drops(module, module.dropout)
    ):
        return original(hidden_states, inputs_size, attention_mask, causal_attention_mask, output_attentions)
    layers = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (layer(hidden_states).unflatten(2, (module.num_heads, -1)) for layer in layers)
    mixed = proxy_attention(q, k, v, inputs_size[0], inputs_size[1], scale=module.scale)
    return module.out_proj(mixed.flatten(2)), None
