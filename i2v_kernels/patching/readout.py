"""Layers in which a few queries read a clip: EVL's decoder (arXiv 2208.03550), UniFormerV2's global block (2211.09552).

Keys and values are linear in the tokens, so the projections can be folded: ``<q, W_k y> = <W_k^T q, y>``, and a mean of
values is the projection of a mean of tokens. T*L tokens are then read as they are, and never projected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .evl import PROJECTIONS
from .rules import Found, Inputs, Replacement, has_parts, not_plain, random_like

NORMS = dict.fromkeys(("norm1", "norm2", "norm3"), nn.LayerNorm)
BY = "keys and values folded into queries and outputs"


def folded(q: Tensor, y: Tensor, key: Tensor, key_bias: Tensor | None, value: Tensor, value_bias: Tensor | None) -> Tensor:
    """Attention of projected queries ``[B, Q, H, D]`` to ``y [B, L, C]``, whose projections are folded: ``[B, Q, values]``."""
    queries, heads, dim = q.shape[1:]
    scaled = q / dim**0.5
    places = torch.einsum("bqhd,hdc->bqhc", scaled, key.unflatten(0, (heads, dim))).flatten(1, 2)  # [B, Q * H, C]
    scores = y @ places.transpose(1, 2)
    if key_bias is not None:  # the same for all tokens: a softmax takes no notice, but a gradient of None would be another
        scores = scores + torch.einsum("bqhd,hd->bqh", scaled, key_bias.unflatten(0, (heads, dim))).flatten(1)[:, None]
    mean = (scores.softmax(1).transpose(1, 2).to(y.dtype) @ y).unflatten(1, (queries, heads))
    mixed = torch.einsum("bqhc,hdc->bqhd", mean, value.unflatten(0, (heads, -1))).flatten(2)
    return mixed if value_bias is None else mixed + value_bias


def pays(queries: int, heads: int, channels: int) -> bool:
    """Whether folded it is less arithmetic than keys and values would be, by far."""
    return 4 * queries * heads <= channels


def evl_decoder_layer(module: Any) -> Found:
    """``TransformerDecoderLayer(x, y)`` of the authors' repository."""
    if not has_parts(module, attn=None, mlp=None, **NORMS) or not has_parts(module.attn, **PROJECTIONS):
        return None
    if getattr(module.attn, "return_all_features", None) is not False:
        return None
    layers = ("attn.k_proj", "attn.v_proj")
    reason = not_plain(module, "attn") or not_plain(module, *layers, kind=nn.Linear)
    return reason or Replacement(_evl, BY, _evl_inputs, uncalled=("attn", *layers))


def _evl_inputs(module: Any) -> Inputs:
    attn = module.attn
    return random_like(module, 2, 1, attn.q_proj.in_features), random_like(module, 2, 7, attn.k_proj.in_features)


def _evl(layer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or any(x.dim() != 3 for x in args):
        return original(*args, **kwargs)
    (x, y), attn = args, layer.attn
    if attn.return_all_features or len(x) != len(y) or not pays(x.shape[1], attn.num_heads, y.shape[2]):
        return original(*args, **kwargs)
    q = attn.q_proj(layer.norm1(x)).unflatten(2, (attn.num_heads, -1))
    key, value = attn.k_proj, attn.v_proj
    x = x + attn.out_proj(folded(q, layer.norm3(y), key.weight, key.bias, value.weight, value.bias))
    return x + layer.mlp(layer.norm2(x))


def uniformer_extractor(module: Any) -> Found:
    """UniFormerV2's ``Extractor(x, y)``: sequence-first, with weights of an ``nn.MultiheadAttention`` that is not called."""
    parts = {"attn": nn.MultiheadAttention, "mlp": None, "drop_path": None}
    if not has_parts(module, **parts, **dict.fromkeys(("ln_1", "ln_2", "ln_3"), nn.LayerNorm)):
        return None
    if module.attn.in_proj_weight is None or module.attn.in_proj_bias is None:
        return "its attention has projections of several widths, or no biases"
    return not_plain(module, "attn") or Replacement(_extract, BY, _extractor_inputs, uncalled=("attn",))


def _extractor_inputs(module: Any) -> Inputs:
    return tuple(random_like(module, count, 2, module.attn.embed_dim) for count in (1, 7))


def _extract(block: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or any(x.dim() != 3 for x in args) or args[0].shape[1:] != args[1].shape[1:]:
        return original(*args, **kwargs)
    (x, y), attn = args, block.attn
    if not pays(len(x), attn.num_heads, x.shape[2]):
        return original(*args, **kwargs)
    (query, key, value), biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q = (block.ln_1(x) @ query.T + biases[0]).unflatten(2, (attn.num_heads, -1)).transpose(0, 1)  # [B, Q, H, D]
    mixed = folded(q, block.ln_3(y).transpose(0, 1), key, biases[1], value, biases[2]).transpose(0, 1)
    x = x + block.drop_path(attn.out_proj(mixed))
    return x + block.drop_path(block.mlp(block.ln_2(x)))
