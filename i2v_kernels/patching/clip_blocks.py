"""Blocks that video models made of CLIP's, on its ``[L, B * T, C]``: AIM's and X-CLIP's, of the authors' repositories."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.functional import temporal_self_attention
from .attention import unlike_clip
from .frame_attention import attend
from .rules import Found, Inputs, Replacement, drops, has_parts, not_plain, random_like

ATTN = ("attn", "attn.out_proj")


def aim_block(module: Any) -> Found:
    """``ResidualAttentionBlock`` with ``T_Adapter``, ``S_Adapter`` and ``MLP_Adapter``: frames are read as they lie."""
    parts = dict.fromkeys(("ln_1", "mlp", "ln_2", "T_Adapter", "S_Adapter", "MLP_Adapter", "drop_path"))
    if not has_parts(module, attn=nn.MultiheadAttention, **parts) or not callable(getattr(module, "attention", None)):
        return None
    return (
        _reason_against(module.attn)
        or not_plain(module, *ATTN)
        or Replacement(
            _aim, "temporal_attention, frames read as they lie", _clips, uncalled=ATTN, reads=("num_frames", "scale")
        )
    )


def x_clip_block(module: Any) -> Found:
    """``CrossFramelAttentionBlock``: messages over frames where they lie, and read as keys without being joined to tokens."""
    parts = dict.fromkeys(("message_fc", "message_ln", "ln_1", "mlp", "ln_2", "drop_path"))
    attentions = {"attn": nn.MultiheadAttention, "message_attn": nn.MultiheadAttention}
    if not has_parts(module, **attentions, **parts):
        return None
    # ln_1 and drop_path are called, but once more than by the authors' code
    uncalled = (*ATTN, "message_attn", "message_attn.out_proj", "ln_1", "drop_path")
    return (
        _reason_against(module.attn, module.message_attn)
        or not_plain(module, *uncalled)
        or Replacement(
            _x_clip,
            "temporal_attention of the messages, frame_attention to frames and messages",
            _clips,
            uncalled=uncalled,
            reads=("T", "num_frames"),
        )
    )


def _reason_against(*attentions: nn.MultiheadAttention) -> str | None:
    for attn in attentions:
        if type(attn) is not nn.MultiheadAttention:
            return f"its attention is a {type(attn).__name__}"
        if attn.batch_first:
            return "its attention is batch_first"
        if (reason := unlike_clip(attn)) is not None:
            return reason
    return None


def _clips(module: Any) -> Inputs:
    return (random_like(module, 5, 2 * _frames(module), module.attn.embed_dim),)


def _frames(module: Any) -> int:
    return getattr(module, "num_frames", None) or module.T


def _fits(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *attentions: nn.MultiheadAttention) -> bool:
    """Whether these are tokens ``[L, B * T, C]``, and attention is what its weights say."""
    return (
        len(args) == 1
        and not kwargs
        and args[0].dim() == 3
        and args[0].shape[1] % _frames(module) == 0
        and module.attn_mask is None
        and not any(drops(attn, attn.dropout) for attn in attentions)
        and _reason_against(*attentions) is None
    )


def _over_frames(attn: nn.MultiheadAttention, x: Tensor, frames: int) -> Tensor:
    """CLIP's own attention over the frames of every token of ``x [L, B * T, C]``."""
    weights = (attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias)
    tokens = x.unflatten(1, (-1, frames)).permute(1, 2, 0, 3)  # [B, T, L, C], a view
    return temporal_self_attention(tokens, attn.num_heads, *weights).permute(2, 0, 1, 3).flatten(1, 2)


def _aim(block: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if not _fits(block, args, kwargs, block.attn):
        return original(*args, **kwargs)
    x: Tensor = args[0]
    normed = block.ln_1(x)
    if getattr(block, "num_tadapter", 1) == 2:
        normed = block.T_Adapter_in(normed)
    x = x + block.drop_path(block.T_Adapter(_over_frames(block.attn, normed, block.num_frames)))
    x = x + block.S_Adapter(block.attention(block.ln_1(x)))
    normed = block.ln_2(x)
    return x + block.mlp(normed) + block.drop_path(block.scale * block.MLP_Adapter(normed))


def _x_clip(block: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if not _fits(block, args, kwargs, block.attn, block.message_attn):
        return original(*args, **kwargs)
    x: Tensor = args[0]
    message = block.message_fc(x[0])  # [B * T, C]
    mixed = _over_frames(block.message_attn, block.message_ln(message)[None], _frames(block))[0]
    message = message + _by_frame(block.drop_path, mixed, _frames(block))
    extra = block.ln_1(message[None])
    x = x + block.drop_path(attend(block.attn, block.ln_1(x), _frames(block), extra, frames=(0,)))
    if block.training:
        block.drop_path(extra)  # draws for the message what is dropped with it
    return x + block.drop_path(block.mlp(block.ln_2(x)))


def _by_frame(drop_path: nn.Module, message: Tensor, frames: int) -> Tensor:
    """Stochastic depth as the authors' code draws it for messages ``[T, B, C]``: once for each frame."""
    return drop_path(message.unflatten(0, (-1, frames)).transpose(0, 1)).transpose(0, 1).flatten(0, 1)
