"""``nn.MultiheadAttention`` as blocks of CLIP and torchvision use it: of tokens to themselves, weights not asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rules import Found, Inputs, Replacement, class_of, drops, random_like


def multihead_attention(module: Any) -> Found:
    """One product for q, k and v, in the order in which tokens lie, and PyTorch's fused attention on views of it.

    PyTorch's own takes ``batch_first`` tokens as a transposed view, of which every token is a product by itself in backward.
    """
    if class_of(module) is not nn.MultiheadAttention:
        return None
    by = "one projection, scaled_dot_product_attention on views"
    return unlike_clip(module) or Replacement(_self_attend, by, _inputs, known=True, uncalled=("out_proj",), reads=("dropout",))


def unlike_clip(module: nn.MultiheadAttention) -> str | None:
    """A reason if it does more than project, attend and project."""
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "its attention has key widths of their own, bias_kv or add_zero_attn"
    return None


def _inputs(module: Any) -> Inputs:
    x = random_like(module, 2, 3, module.embed_dim)
    return x, x, x, None, False


def _self_attend(
    attn: Any,
    original: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    learns = torch.is_grad_enabled() and (query.requires_grad or any(p.requires_grad for p in attn.parameters()))
    if (
        not learns  # PyTorch has a fast path then
        or not (query is key is value)
        or query.dim() != 3
        or query.is_nested
        or need_weights
        or key_padding_mask is not None
        or is_causal
        or (attn_mask is not None and attn_mask.dim() != 2)
        or drops(attn, attn.dropout)
    ):
        return original(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    qkv = F.linear(query, attn.in_proj_weight, attn.in_proj_bias).unflatten(2, (3, attn.num_heads, -1))
    q, k, v = qkv.permute((2, 0, 3, 1, 4) if attn.batch_first else (2, 1, 3, 0, 4)).unbind(0)  # [B, H, L, D]
    mask = ~attn_mask if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    tokens = mixed.permute((0, 2, 1, 3) if attn.batch_first else (2, 0, 1, 3)).flatten(2)
    return F.linear(tokens, attn.out_proj.weight, attn.out_proj.bias), None
