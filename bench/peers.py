"""What a user would write without this package: each op's best-known formulations in PyTorch, eager. They are compiled too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .text_peers import (
    compared,
    late_by_products,
    late_published,
    mean_product,
    mean_published,
    pool_einsum,
    pool_published,
    pool_sdpa,
)


def attention_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products and a softmax; PyTorch arranges the batches."""
    scores = torch.einsum("btnhd,bsnhd->bnhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnhts,bsnhd->btnhd", scores.softmax(-1), v)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As published: tokens to the batch, ``scaled_dot_product_attention``, and back."""
    batch, frames, tokens, heads, dim = q.shape

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1, 4).reshape(batch * tokens, heads, frames, dim)

    out = F.scaled_dot_product_attention(rows(q), rows(k), rows(v))
    return out.reshape(batch, tokens, heads, frames, dim).permute(0, 3, 1, 2, 4)


def attention_sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through one of SDPA's kernels, which raises where that one cannot run."""
    with sdpa_kernel(backend):
        return attention_sdpa(q, k, v)


def attention_elementwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products and sums alone, for the compiler to fuse."""
    scores = (q[:, :, None] * k[:, None]).sum(-1) * q.shape[-1] ** -0.5  # [B, T, T, N, H]
    return (scores.softmax(2)[..., None] * v[:, None]).sum(2)


Frames = str | tuple[int, ...] | tuple[tuple[int, ...], ...]


def _moved(x: Tensor, offset: int) -> Tensor:
    """Frame ``t + offset`` in the place of frame t, zeros outside the clip."""
    if offset == 0:
        return x
    outside = torch.zeros_like(x[:, : abs(offset)])
    return torch.cat([x[:, offset:], outside] if offset > 0 else [outside, x[:, :offset]], dim=1)


def _moved_heads(x: Tensor, frames: Frames) -> Tensor:
    """As published by ZeroI2V: a copy, then heads of neighbours in their places; edges stay."""
    out = x.clone()
    for h, (offset,) in enumerate(frames):  # type: ignore[misc]
        if offset > 0:  # type: ignore[operator]
            out[:, :-offset, :, h] = x[:, offset:, :, h]  # type: ignore[operator]
        elif offset < 0:  # type: ignore[operator]
            out[:, -offset:, :, h] = x[:, :offset, :, h]  # type: ignore[operator]
    return out


def frames_concatenated(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, frames: Frames, edges: str = "mask",
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """As published, with PyTorch's fused attention inside: keys of all frames and extra keys side by side for each frame."""
    if k is None or v is None:
        q, k, v = q.unbind(3)
    batch, length, tokens = q.shape[:3]
    whole = frames == "all"

    def keys(x: Tensor, more: Tensor | None) -> Tensor:
        if whole:
            parts = [x.flatten(1, 2), *([] if more is None else [more[:, 0]])]
            return torch.cat(parts, dim=1).transpose(1, 2)
        if isinstance(frames[0], tuple):
            parts = [_moved_heads(x, frames)]
        else:
            parts = [_moved(x, offset) for offset in frames]  # type: ignore[arg-type]
        if more is not None:
            parts.append(more.expand(batch, length, *more.shape[2:]))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return joined.flatten(0, 1).transpose(1, 2)

    queries = (q.flatten(1, 2) if whole else q.flatten(0, 1)).transpose(1, 2)
    more = (None, None) if extra is None else extra
    out = F.scaled_dot_product_attention(queries, keys(k, more[0]), keys(v, more[1])).transpose(1, 2)
    return out.reshape(batch, length, tokens, *q.shape[3:])


def frames_concatenated_by(backend: SDPBackend, *args: Tensor, **options: Any) -> Tensor:
    """The same through one of SDPA's kernels, which raises where that one cannot run."""
    with sdpa_kernel(backend):
        return frames_concatenated(*args, **options)


def shift_slices(x: Tensor, groups: list[tuple[int, int]], padding: str = "zeros", residual: bool = False) -> Tensor:
    """As published by TSM: a copy, then slices from the neighbours."""
    out, first = x.clone(), 0
    for count, offset in groups:
        part = slice(first, first + count)
        if offset > 0:
            out[:, offset:, :, part] = x[:, :-offset, :, part]
            if padding == "zeros":
                out[:, :offset, :, part] = 0
        else:
            out[:, :offset, :, part] = x[:, -offset:, :, part]
            if padding == "zeros":
                out[:, offset:, :, part] = 0
        first += count
    return x + out if residual else out


def shift_cat(x: Tensor, groups: list[tuple[int, int]], padding: str = "zeros", residual: bool = False) -> Tensor:
    """Every group moved on its own, then one concatenation."""
    parts, first = [], 0
    for count, offset in groups:
        part = x[..., first : first + count]
        outside = torch.zeros_like(part[:, : abs(offset)])
        if padding == "edge":
            outside = (part[:, :1] if offset > 0 else part[:, -1:]).expand_as(outside)
        moved = [outside, part[:, :-offset]] if offset > 0 else [part[:, -offset:], outside]
        parts.append(torch.cat(moved, dim=1))
        first += count
    out = torch.cat([*parts, x[..., first:]], dim=-1)
    return x + out if residual else out


def _volume(x: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    return x[:, :, prefix:].unflatten(2, grid).permute(0, 4, 1, 2, 3)


def _padded(patches: Tensor, prefix: int) -> Tensor:
    """Zeros in front of the patches; ``pad`` copies even where there are none to add."""
    return F.pad(patches, (0, 0, prefix, 0)) if prefix else patches


def _tokens(volume: Tensor, prefix: int) -> Tensor:
    return _padded(volume.permute(0, 2, 3, 4, 1).flatten(2, 3), prefix)


def conv_conv3d(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """As published by ST-Adapter: permute to [B, C, T, H, W], copy, ``conv3d(groups=C)``, back."""
    padding = [size // 2 for size in weight.shape[2:]]
    volume = _volume(x, grid, prefix).contiguous()
    return _tokens(F.conv3d(volume, weight, bias, padding=padding, groups=x.shape[3]), prefix)


def conv_channels_last(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """The same on the tokens as they lie: to PyTorch a channels_last_3d tensor."""
    padding = [size // 2 for size in weight.shape[2:]]
    return _tokens(F.conv3d(_volume(x, grid, prefix), weight, bias, padding=padding, groups=x.shape[3]), prefix)


def conv_shifted_add(x: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """One multiply-add per tap over padded slices."""
    kt, kh, kw = weight.shape[2:]
    (height, width), frames = grid, x.shape[1]
    padded = F.pad(x[:, :, prefix:].unflatten(2, grid), (0, 0, kw // 2, kw // 2, kh // 2, kh // 2, kt // 2, kt // 2))
    out = bias.expand(*x.shape[:2], height, width, -1)
    for i in range(kt):
        for j in range(kh):
            for k in range(kw):
                out = out + padded[:, i : i + frames, j : j + height, k : k + width] * weight[:, 0, i, j, k]
    return _padded(out.flatten(2, 3), prefix)


def st_adapter_published(
    x: Tensor, down: Tensor, down_bias: Tensor, conv: Tensor, conv_bias: Tensor, up: Tensor, up_bias: Tensor,
    grid: tuple[int, int],
) -> Tensor:  # fmt: skip
    """As published: patches to ``[B, C, T, H, W]`` for ``conv3d(groups=C)``, back, and into zeros that are added."""
    hidden = conv_conv3d(F.linear(x[:, :, 1:], down, down_bias), conv, conv_bias, grid, 0)
    update = torch.zeros_like(x)
    update[:, :, 1:] = F.linear(hidden, up, up_bias)
    return x + update


def st_adapter_shifted_add(
    x: Tensor, down: Tensor, down_bias: Tensor, conv: Tensor, conv_bias: Tensor, up: Tensor, up_bias: Tensor,
    grid: tuple[int, int],
) -> Tensor:  # fmt: skip
    """With the convolution as one multiply-add per tap, and the class tokens put back in front."""
    hidden = conv_shifted_add(F.linear(x[:, :, 1:], down, down_bias), conv, conv_bias, grid, 0)
    return torch.cat([x[:, :, :1], x[:, :, 1:] + F.linear(hidden, up, up_bias)], dim=2)


def bottleneck_published(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, activation: str = "gelu", scale: float = 1.0,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """Linear, activation, linear, as AIM and AdaptFormer write it."""
    rows = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)
    hidden = getattr(F, activation)(F.linear(rows, down, down_bias))
    update = F.linear(hidden, up, up_bias)
    return x + (update if scale == 1 else update * scale)


def lora_published(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """As PEFT computes it."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, lora_a), lora_b) * scaling


def cross_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As published by EVL: scores ``[B, Q, T * N, H]``, their softmax over the keys, and both products by einsum."""
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    scores = torch.einsum("nqhc,nkhc->nqkh", q / q.shape[-1] ** 0.5, k)
    return torch.einsum("nqkh,nkhc->nqhc", scores.softmax(-2), v)


def cross_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As published by UniFormerV2: heads to the batch, two products and a softmax."""
    q, k, v = q.transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
    shares = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
    return (shares @ v).transpose(1, 2)


def cross_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``scaled_dot_product_attention`` on views, without a copy where frames lie one after the other."""
    q, k, v = q.transpose(1, 2), k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def cross_sdpa_by(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through one of SDPA's kernels, which raises where that one cannot run."""
    with sdpa_kernel(backend):
        return cross_sdpa(q, k, v)


def bias_published(
    q: Tensor, k: Tensor, weight_previous: Tensor, weight_next: Tensor, grid: tuple[int, int], prefix: int = 1
) -> Tensor:
    """As published by EVL: scores with the heads innermost, a weight gathered for every pair of patches."""
    batch, frames, tokens, _, dim = q.shape
    index = _relative_places(*grid, q.device)
    out = torch.zeros(batch, frames, tokens, weight_previous.shape[1], dtype=q.dtype, device=q.device)
    for rows, keys, weight in (
        (slice(1, None), slice(None, -1), weight_previous), (slice(None, -1), slice(1, None), weight_next),
    ):  # fmt: skip
        scores = torch.einsum("btqhd,btkhd->btqkh", q[:, rows, prefix:] / dim**0.5, k[:, keys, prefix:])
        out[:, rows, prefix:] += torch.einsum("btqk,qkc->btqc", scores.softmax(-2).mean(-1), weight[index])
    return out


def _relative_places(height: int, width: int, device: torch.device) -> Tensor:
    """``[P, P]``: rows of the weights."""
    row, column = (place.flatten() for place in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    places = (row[:, None] - row + height - 1) * (2 * width - 1) + column[:, None] - column + width - 1
    return places.to(device)


Triple = tuple[float, float, float]


def _normalised(frames: Tensor, mean: Triple, std: Triple, dtype: torch.dtype) -> Tensor:
    """[B, T, H, W, 3], in float32 until it is done."""
    wide = torch.promote_types(dtype, torch.float32)
    constants = {"dtype": wide, "device": frames.device}
    return ((frames.to(wide) / 255 - torch.tensor(mean, **constants)) / torch.tensor(std, **constants)).to(dtype)


def _images(frames: Tensor, mean: Triple, std: Triple, dtype: torch.dtype) -> Tensor:
    """[B*T, 3, H, W] planes, normalised as models do it."""
    wide = torch.promote_types(dtype, torch.float32)
    constants = {"dtype": wide, "device": frames.device}
    planes = frames.flatten(0, 1).permute(0, 3, 1, 2).contiguous().to(wide)
    centred = planes / 255 - torch.tensor(mean, **constants).view(3, 1, 1)
    return (centred / torch.tensor(std, **constants).view(3, 1, 1)).to(dtype)


def _embedded(images: Tensor, weight: Tensor, bias: Tensor | None, batch: int) -> Tensor:
    grid = F.conv2d(images, weight, bias, stride=weight.shape[2:])
    return grid.flatten(2).transpose(1, 2).unflatten(0, (batch, -1))


def embed_conv2d(frames: Tensor, weight: Tensor, bias: Tensor | None = None, *, mean: Triple, std: Triple) -> Tensor:
    """As published: planes, normalised, ``Conv2d(stride=patch)``, flattened and transposed."""
    return _embedded(_images(frames, mean, std, weight.dtype), weight, bias, len(frames))


def embed_channels_last(frames: Tensor, weight: Tensor, bias: Tensor | None = None, *, mean: Triple, std: Triple) -> Tensor:
    """The same without the planes: frames as they lie are channels_last images."""
    images = _normalised(frames, mean, std, weight.dtype).flatten(0, 1).permute(0, 3, 1, 2)
    return _embedded(images, weight, bias, len(frames))


def embed_linear(frames: Tensor, weight: Tensor, bias: Tensor | None = None, *, mean: Triple, std: Triple) -> Tensor:
    """Normalise, cut into patches, one linear layer."""
    (batch, length, height, width, _), (_, _, ph, pw) = frames.shape, weight.shape
    grid = _normalised(frames, mean, std, weight.dtype).view(batch, length, height // ph, ph, width // pw, pw, 3)
    return F.linear(grid.permute(0, 1, 2, 4, 6, 3, 5).reshape(batch, length, -1, 3 * ph * pw), weight.flatten(1), bias)


# An op without one is measured all the same, beside its floor.
PEERS: defaultdict[str, dict[str, Callable[..., Tensor]]] = defaultdict(dict)
PEERS |= {
    "temporal_attention": {
        "einsum": attention_einsum,
        "sdpa": attention_sdpa,
        "elementwise": attention_elementwise,
    },
    "frame_attention": {"concatenated": frames_concatenated},
    "video_cross_attention": {"einsum": cross_einsum, "products": cross_products, "sdpa": cross_sdpa},
    "token_shift": {"slices": shift_slices, "cat": shift_cat},
    "temporal_conv": {"conv3d": conv_conv3d, "channels_last": conv_channels_last, "shifted_add": conv_shifted_add},
    "st_adapter": {"published": st_adapter_published, "shifted_add": st_adapter_shifted_add},
    "bottleneck_adapter": {"published": bottleneck_published},
    "lora_linear": {"published": lora_published},
    "frame_bias": {"published": bias_published},
    "text_conditioned_pool": {"published": pool_published, "einsum": pool_einsum, "sdpa": pool_sdpa},
    "text_conditioned_similarity": {
        "published": partial(compared, pool_published),
        "einsum": partial(compared, pool_einsum),
        "sdpa": partial(compared, pool_sdpa),
    },
    "masked_mean": {"published": mean_published, "product": mean_product},
    "late_interaction": {"einsum": late_published, "products": late_by_products},
    "patch_embed": {"conv2d": embed_conv2d, "channels_last": embed_channels_last, "linear": embed_linear},
}

# Not compiled, and left out where they cannot run.
GPU_PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "temporal_attention": {
        "sdpa flash": partial(attention_sdpa_by, SDPBackend.FLASH_ATTENTION),
        "sdpa math": partial(attention_sdpa_by, SDPBackend.MATH),
        "sdpa efficient": partial(attention_sdpa_by, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": partial(attention_sdpa_by, SDPBackend.CUDNN_ATTENTION),
    },
    "frame_attention": {
        "concatenated, flash": partial(frames_concatenated_by, SDPBackend.FLASH_ATTENTION),
        "concatenated, cudnn": partial(frames_concatenated_by, SDPBackend.CUDNN_ATTENTION),
    },
    "video_cross_attention": {
        "sdpa flash": partial(cross_sdpa_by, SDPBackend.FLASH_ATTENTION),
        "sdpa math": partial(cross_sdpa_by, SDPBackend.MATH),
        "sdpa efficient": partial(cross_sdpa_by, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": partial(cross_sdpa_by, SDPBackend.CUDNN_ATTENTION),
    },
}
