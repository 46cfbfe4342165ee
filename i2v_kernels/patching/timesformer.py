"""TimeSformer, transformers' and its authors': attention over frames and within them, without moving tokens about.

Tokens are ``[B, 1 + P * T, C]``: a class token, then patches, each with its T frames together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.plain import is_plain
from ..ops.temporal_attention import temporal_attention
from . import mlp
from .rules import Found, Inputs, Replacement, drops, has_parts, is_class, not_plain, random_like

PACKAGE = "transformers.models.timesformer"


def self_attention(module: Any) -> Found:
    """Attention within a frame, or over all tokens: PyTorch's fused attention, on views of the projection."""
    by = "scaled_dot_product_attention"
    if is_class(module, PACKAGE, "TimesformerSelfAttention"):
        probe = lambda m: (random_like(m, 2, 17, m.qkv.in_features),)  # noqa: E731
        return not_plain(module, "attn_drop") or Replacement(_attend, by, probe, known=True, uncalled=("attn_drop",))
    parts = {"qkv": nn.Linear, "proj": nn.Linear, "attn_drop": nn.Dropout, "proj_drop": nn.Dropout}
    if has_parts(module, **parts) and len(module._modules) == len(parts):
        probe = lambda m: (random_like(m, 2, 17, m.qkv.in_features),)  # noqa: E731
        return not_plain(module, "attn_drop") or Replacement(_attend_and_project, by, probe, uncalled=("attn_drop",))
    return None


def _attend(module: Any, original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _asked(*args, **kwargs) or hidden_states.dim() != 3 or drops(module, module.attn_drop.p):
        return original(hidden_states, *args, **kwargs)
    return (_within_rows(module, hidden_states),)


def _asked(output_attentions: bool = False, **others: Any) -> bool:
    """Whether more than the output is asked for: attentions have shapes of the original's choice."""
    return bool(output_attentions or others)


def _attend_and_project(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or args[0].dim() != 3 or drops(module, module.attn_drop.p):
        return original(*args, **kwargs)
    return module.proj_drop(module.proj(_within_rows(module, args[0])))


def _within_rows(module: Any, x: Tensor) -> Tensor:
    """Attention among the tokens of ``x [rows, L, C]``, without its last projection."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, scale=module.scale).transpose(1, 2).flatten(2)


def divided_layer(module: Any) -> Found:
    """Divided attention: over frames where they lie, and one copy in place of five between the two layouts."""
    by = "temporal_attention, frames read as they lie"
    if is_class(module, PACKAGE, "TimesformerLayer") and module.attention_type == "divided_space_time":
        uncalled = tuple(f"temporal_attention{part}" for part in ("", ".attention", ".attention.attn_drop", ".output"))
        uncalled += ("intermediate.intermediate_act_fn",)
        return not_plain(module, *uncalled) or Replacement(_layer, by, _layer_inputs, known=True, uncalled=uncalled)
    attention, time_attention = (getattr(module, name, None) for name in ("attn", "temporal_attn"))
    if has_parts(module, temporal_fc=nn.Linear, temporal_norm1=None, norm1=None, norm2=None, mlp=None) and all(
        isinstance(part, nn.Module) and has_parts(part, qkv=nn.Linear, proj=nn.Linear, attn_drop=nn.Dropout)
        for part in (attention, time_attention)
    ):
        probe = lambda m: (random_like(m, 2, 25, m.temporal_fc.in_features), 2, 4, 2)  # noqa: E731
        uncalled = ("temporal_attn", "temporal_attn.attn_drop")
        return not_plain(module, *uncalled) or Replacement(_block, by, probe, uncalled=uncalled)
    return None


def _layer_inputs(module: Any) -> Inputs:
    config = module.config
    patches = (config.image_size // config.patch_size) * 2
    return (random_like(module, 2, 1 + patches * config.num_frames, config.hidden_size),)


class _Divided(NamedTuple):
    """A block's parts, whatever they are called in it."""

    time_norm: Any
    time_attention: Any  # with qkv, num_heads, scale and attn_drop
    time_output: tuple[Any, Any]  # its projection, dropout
    time_second: Any  # the linear layer behind it
    norm: Any
    attention: Callable[[Tensor], Tensor]
    feed_forward: Callable[[Tensor], Tensor]
    drop_path: Any


def _layer(layer: Any, original: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``TimesformerLayer``."""
    temporal = layer.temporal_attention
    parts = _Divided(
        layer.temporal_layernorm,
        temporal.attention,
        (temporal.output.dense, temporal.output.dropout),
        layer.temporal_dense,
        layer.layernorm_before,
        lambda x: layer.attention(x)[0],
        lambda x: _feed_forward(layer, layer.layernorm_after(x)),
        layer.drop_path,
    )
    frames, width = layer.config.num_frames, layer.config.image_size // layer.config.patch_size
    if _asked(*args, **kwargs) or hidden_states.dim() != 3 or not _fits(parts, hidden_states, frames, width):
        return original(hidden_states, *args, **kwargs)
    return (_divided(parts, hidden_states, frames),)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    inner, outer = layer.intermediate, layer.output
    activation, idle = inner.intermediate_act_fn, [inner.dropout, outer.dropout]
    if is_plain(inner, outer) and mlp.may_fuse(inner.dense, activation, outer.dense, idle):
        return mlp.fused(x, inner.dense, activation, outer.dense)
    return outer(inner(x))


def _block(block: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    """``Block`` of the authors' repository and its forks: ``forward(x, B, T, W)``."""
    if kwargs or len(args) != 4 or getattr(block, "attention_type", "divided_space_time") != "divided_space_time":
        return original(*args, **kwargs)
    x, clips, frames, width = args
    temporal = block.temporal_attn
    parts = _Divided(
        block.temporal_norm1,
        temporal,
        (temporal.proj, getattr(temporal, "proj_drop", nn.Identity())),
        block.temporal_fc,
        block.norm1,
        block.attn,
        lambda x: block.mlp(block.norm2(x)),
        block.drop_path,
    )
    if x.dim() != 3 or clips != len(x) or not _fits(parts, x, frames, width):
        return original(*args, **kwargs)
    return _divided(parts, x, frames)


def _fits(parts: _Divided, x: Tensor, frames: int, width: int) -> bool:
    whole = (x.shape[1] - 1) % (frames * width) == 0  # else it is the original's error, or what it cuts off
    return whole and not drops(parts.time_attention, parts.time_attention.attn_drop.p)


def _divided(parts: _Divided, x: Tensor, frames: int) -> Tensor:
    clips, _, channels = x.shape
    over_frames = parts.time_attention
    # The class token is normalised with the rest: one row more, in place of a copy of all others.
    normed = _WithoutClass.apply(parts.time_norm(x))
    qkv = over_frames.qkv(normed).unflatten(2, (3, over_frames.num_heads, -1)).unflatten(1, (-1, frames))
    mixed = temporal_attention(qkv.transpose(1, 2), scale=over_frames.scale).transpose(1, 2)  # [B, P, T, H, D]
    x = _AddToPatches.apply(x, _projected(parts, mixed.reshape(-1, frames, channels), clips))

    attended = parts.drop_path(parts.attention(_ByFrame.apply(parts.norm(x), frames)))
    x = _AddByFrame.apply(x, attended, frames)
    return x + parts.drop_path(parts.feed_forward(x))


def _projected(parts: _Divided, x: Tensor, clips: int) -> Tensor:
    """What follows attention over frames, two linear layers with nothing between them: ``[B * P, T, C]`` -> ``[B, P * T, C]``.

    Their product is one layer. It costs as much as C tokens, where there are more it pays.
    """
    (first, dropout), second, channels = parts.time_output, parts.time_second, x.shape[-1]
    if (
        x.numel() <= channels**2
        or not is_plain(first, second, kind=nn.Linear)
        or not isinstance(parts.drop_path, nn.Identity)
        or drops(dropout, getattr(dropout, "p", 0.0))
        or not is_plain(dropout, parts.drop_path)
    ):
        # Stochastic depth draws once for each patch.
        return second(parts.drop_path(dropout(first(x))).view(clips, -1, channels))
    bias: Tensor | None = second.bias
    if first.bias is not None:
        moved = second.weight @ first.bias
        bias = moved if bias is None else moved + bias
    return F.linear(x.view(clips, -1, channels), second.weight @ first.weight, bias)


def _frames_first(x: Tensor, frames: int) -> Tensor:
    """``[B, 1 + P * T, C]`` -> a view of its patches ``[B, T, P, C]``."""
    return x[:, 1:].unflatten(1, (-1, frames)).transpose(1, 2)


def _add(x: Tensor, y: Tensor, out: Tensor) -> None:
    if torch.compiler.is_compiling():  # which takes no such out=, and makes one pass of both
        out.copy_(x + y)
    else:
        torch.add(x, y, out=out)


# Written out because autograd would fill a tensor with zeros for each slice that is taken, and add these up. The gradients are
# PyTorch's operators: with create_graph=True they are differentiated like others.


class _WithoutClass(torch.autograd.Function):
    """``[B, 1 + N, C]`` -> ``[B, N, C]``, dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x[:, 1:].clone(memory_format=torch.contiguous_format) if len(x) > 1 else x[:, 1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return F.pad(grad, (0, 0, 1, 0))


class _AddToPatches(torch.autograd.Function):
    """``x [B, 1 + N, C]`` with ``residual [B, N, C]`` added to all but the class token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out[:, 0] = x[:, 0]
        _add(x[:, 1:], residual, out[:, 1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad[:, 1:]


class _ByFrame(torch.autograd.Function):
    """``[B, 1 + P * T, C]`` -> ``[B * T, 1 + P, C]``, the class token in every frame."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: int) -> Tensor:
        ctx.frames = frames
        out = x.new_empty(len(x), frames, 1 + (x.shape[1] - 1) // frames, x.shape[2])
        out[:, :, 0] = x[:, :1]
        out[:, :, 1:] = _frames_first(x, frames)
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.unflatten(0, (-1, ctx.frames))
        out = grad.new_empty(len(grad), 1 + ctx.frames * (grad.shape[2] - 1), grad.shape[3])
        out[:, 0] = grad[:, :, 0].sum(1)
        _frames_first(out, ctx.frames).copy_(grad[:, :, 1:])
        return out, None


class _AddByFrame(torch.autograd.Function):
    """``x [B, 1 + P * T, C]`` plus ``residual [B * T, 1 + P, C]``, of whose class tokens the mean is taken."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, frames: int) -> Tensor:
        ctx.frames = frames
        residual = residual.unflatten(0, (-1, frames))
        out = torch.empty_like(x)
        out[:, 0] = x[:, 0] + residual[:, :, 0].mean(1)
        _add(_frames_first(x, frames), residual[:, :, 1:], _frames_first(out, frames))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        patches = _frames_first(grad, ctx.frames)
        out = grad.new_empty(*patches.shape[:2], 1 + patches.shape[2], grad.shape[2])
        out[:, :, 0] = grad[:, :1] / ctx.frames
        out[:, :, 1:] = patches
        return grad, out.flatten(0, 1), None
