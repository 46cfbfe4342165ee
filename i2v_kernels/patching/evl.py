"""EVL (arXiv 2208.03550) as its authors wrote it: fused attention on views, the temporal convolution on tokens as they lie."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.frame_bias import frame_bias
from ..ops.frame_bias.reference import relative_index
from ..ops.temporal_conv import temporal_conv
from .rules import Found, Inputs, Replacement, has_parts, keeps_its_dtype, not_plain, random_like

PROJECTIONS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), nn.Linear)


def attention(module: Any) -> Found:
    """``Attention`` that returns its output alone: its scores are not written."""
    if not has_parts(module, **PROJECTIONS) or getattr(module, "return_all_features", None) is not False:
        return None
    return Replacement(_attend, "scaled_dot_product_attention", _three)


def _three(module: Any) -> Inputs:
    q = random_like(module, 2, 3, module.q_proj.in_features)
    return q, random_like(module, 2, 5, module.k_proj.in_features), random_like(module, 2, 5, module.v_proj.in_features)


def _attend(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 3 or module.return_all_features or any(x.dim() != 3 for x in args):
        return original(*args, **kwargs)
    return _mixed(module, *_projected(module, *args))


def _projected(module: Any, *args: Tensor) -> list[Tensor]:
    """q, k and v as ``[N, L, H, D]``."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    return [layer(x).unflatten(2, (module.num_heads, -1)) for layer, x in zip(layers, args)]


def _mixed(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return module.out_proj(mixed.transpose(1, 2).flatten(2))


def encoder_layer(module: Any) -> Found:
    """``TransformerEncoderLayer`` that returns its features: attention's scores are not among them."""
    if not has_parts(module, attn=None, mlp=None, norm1=None, norm2=None) or not has_parts(module.attn, **PROJECTIONS):
        return None
    if getattr(module, "return_all_features", None) is not True:
        return None
    probe = lambda m: (random_like(m, 2, 5, m.attn.q_proj.in_features),)  # noqa: E731
    return not_plain(module, "attn") or Replacement(_encode, "scaled_dot_product_attention", probe, uncalled=("attn",))


def _encode(layer: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or args[0].dim() != 3 or not layer.return_all_features:
        return original(*args, **kwargs)
    normed = layer.norm1(args[0])
    q, k, v = _projected(layer.attn, normed, normed, normed)
    mixed = _mixed(layer.attn, q, k, v)
    x = args[0] + mixed
    return {"q": q, "k": k, "v": v, "attn_out": mixed, "out": x + layer.mlp(layer.norm2(x))}


_CHECKED: WeakKeyDictionary[nn.Module, tuple[Tensor, int]] = WeakKeyDictionary()  # idx_tensor, and how often it was changed


def cross_attention(module: Any) -> Found:
    """``TemporalCrossAttention``: no weight is gathered for every pair of patches, and the output is where its inputs are."""
    found: list[Any] = [getattr(module, name, None) for name in ("w1", "w2", "idx_tensor")]
    if not all(isinstance(x, Tensor) and x.dim() == 2 for x in found) or list(module.children()):
        return None
    (w1, w2, index), grid = found, getattr(module, "spatial_size", None)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or w1.shape != w2.shape:
        return None
    if len(w1) != (2 * grid[0] - 1) * (2 * grid[1] - 1) or len(index) != grid[0] * grid[1]:
        return None
    if not index.is_meta and not _places_hold(module, wait=True):
        return "its idx_tensor is not that of relative places in its spatial_size"
    return Replacement(_attend_across, "frame_bias", _pair, reads=("idx_tensor",), stand_in=_narrowed)


def _places_hold(module: Any, wait: bool = False) -> bool:
    """Whether ``idx_tensor`` holds what the op takes for granted. One on a GPU is read once, when the module is patched."""
    index = module.idx_tensor
    known = _CHECKED.get(module)
    if known is not None and known[0] is index and known[1] == index._version:
        return True
    if not (wait or index.is_cpu) or not torch.equal(index.cpu(), relative_index(*module.spatial_size)):
        return False
    if not index.is_inference():
        _CHECKED[module] = index, index._version
    return True


def _narrowed(module: Any) -> None:
    """Columns of the weights are alike: with all of them a trial would take gigabytes."""
    for name in ("w1", "w2"):
        setattr(module, name, nn.Parameter(getattr(module, name).detach()[:, :8].clone()))


def _pair(module: Any) -> Inputs:
    height, width = module.spatial_size
    q = random_like(module, 1, 3, 1 + height * width, 2, 8)
    return q, q.roll(1, 1) + 0.5 * q.flip(2)


def _attend_across(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or torch.compiler.is_compiling() or not _places_hold(module):
        return original(*args, **kwargs)
    (q, k), (height, width) = args, module.spatial_size
    if any(x.dim() != 5 or x.stride(4) != 1 for x in args) or q.shape != k.shape or q.shape[2] != 1 + height * width:
        return original(*args, **kwargs)
    alike = q.dtype == k.dtype == module.w1.dtype == module.w2.dtype
    if not (alike or torch.is_autocast_enabled(q.device.type)):
        return original(*args, **kwargs)
    bias = frame_bias(q, k, module.w1, module.w2, grid=(height, width))
    return bias.to(torch.get_default_dtype())  # that of the memory to which the authors' class adds its halves


def decoder(module: Any) -> Found:
    """``EVLDecoder``: the depthwise ``Conv1d`` over frames and its residual in one pass, without two transposed copies."""
    if not has_parts(module, decoder_layers=nn.ModuleList, temporal_conv=nn.ModuleList):
        return None
    reason = next((r for conv in module.temporal_conv if (r := _why_not(conv)) is not None), None)
    convs = tuple(f"temporal_conv.{i}" for i in range(len(module.temporal_conv)))
    by = "temporal_conv, which leaves the features as they were"
    return reason or not_plain(module, *convs) or Replacement(_decode, by, _features, uncalled=convs, stand_in=_stand_in)


def _why_not(conv: Any) -> str | None:
    if type(conv) is not nn.Conv1d:
        return f"its convolution over frames is a {type(conv).__name__}"
    (size,), (dilation,) = conv.kernel_size, conv.dilation
    depthwise = conv.groups == conv.in_channels == conv.out_channels and size in (3, 5, 7)
    if not depthwise or conv.stride != (1,) or conv.padding != (dilation * (size // 2),) or conv.padding_mode != "zeros":
        return f"its convolution over frames is not depthwise and of the clip's length: {conv}"
    return None


class _Difference(nn.Module):
    """In the place of the authors' cross attention between frames, which makes its output on a GPU whatever its input is on."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).flatten(3)


def _stand_in(module: Any) -> None:
    if has_parts(module, cross_attention=nn.ModuleList):
        module.cross_attention = nn.ModuleList(_Difference() for _ in module.cross_attention)


def _features(module: Any) -> Inputs:
    channels = module.temporal_conv[0].in_channels
    heads = module.decoder_layers[0].attn.num_heads
    tables = getattr(module, "temporal_pos_embed", None)
    tokens = random_like(module, 2, len(tables[0]) if tables else 4, 5, channels)
    qk = tokens.unflatten(3, (heads, -1))
    return ([{"out": tokens.roll(i, 1), "q": qk, "k": qk.flip(1)} for i in range(len(module.decoder_layers))],)


def _decode(decoder: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1 or len(args[0]) != decoder.num_layers or not decoder.enable_temporal_conv:
        return original(*args, **kwargs)
    whole = all(keeps_its_dtype(features["out"]) for features in args[0])
    if not whole or any(_why_not(conv) for conv in decoder.temporal_conv):
        return original(*args, **kwargs)
    x = decoder.cls_token.view(1, 1, -1).repeat(len(args[0][0]["out"]), 1, 1)
    for i, (layer, features) in enumerate(zip(decoder.decoder_layers, args[0])):
        conv = decoder.temporal_conv[i]
        weight = conv.weight[..., None, None]
        tokens = temporal_conv(features["out"], weight, conv.bias, dilation=conv.dilation[0], residual=True)
        if decoder.enable_temporal_pos_embed:
            tokens = tokens + decoder.temporal_pos_embed[i][:, None]
        if decoder.enable_temporal_cross_attention:
            tokens = tokens + decoder.cross_attention[i](features["q"], features["k"])
        x = layer(x, tokens.flatten(1, 2))
    return x
