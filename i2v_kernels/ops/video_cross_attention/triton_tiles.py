"""What the Triton kernels of ``video_cross_attention`` share: tiles, and products of queries with a tile of keys or values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..temporal_attention.triton_tiles import ONE_WARP
from ..triton_common import cdiv, dot_precision, dots_in_fp32, pow2


@dataclass(frozen=True)
class Tiles:
    """``BQ`` queries, ``BK`` tokens of a frame, ``BD`` channels padded; ``TILES`` of them make a piece (forward)."""

    BQ: int
    BK: int
    BD: int
    TILES: int
    threads: int


def tiles(queries: int, tokens: int, dim: int, itemsize: int, backward: bool) -> Tiles:
    """Chosen by shape and dtype alone, so that the same call always gives the same bits."""
    bd = max(pow2(dim), 16)
    if queries == 1:  # of keys and of values 128 bytes for each of a warp's lanes; half where their gradients are kept too
        bk = min(max((2048 if backward else 4096) // itemsize // bd, 4), 128)
        return Tiles(1, min(bk, max(pow2(tokens), 16)), bd, 1, ONE_WARP)
    if itemsize == 4:  # products on the ordinary units hold their operands in registers: small tiles, many threads
        return Tiles(16, 16, bd, 4, 256 if backward and bd > 64 else 128)
    bq = 16 if queries <= 16 else 32 if queries <= 32 or bd > 64 or backward else 64
    if backward:  # several blocks of queries keep addresses too
        rows = 32 if (bd <= 64 and queries <= 32) or (bd <= 128 and queries <= 16) else 16
    else:
        rows = 64 if bd <= 64 else 32
    bk = min(rows, max(pow2(tokens), 16))
    warps = bq // 16 * (max(bd // 64, 1) if backward else 1)
    if not backward and bd > 64:
        warps = max(warps, 2) * (2 if bd > 128 else 1)
    return Tiles(bq, bk, bd, min(4, max(cdiv(tokens, bk), 1)), warps * ONE_WARP)


def flat(k: Tensor, mask: Tensor | None) -> bool:
    """Whether the frames' tokens are one row of tokens."""
    return mask is None and k.stride(1) == k.shape[2] * k.stride(2)


def as_one_frame(mask: Tensor | None, *tensors: Tensor | None) -> list[Any]:
    """The tensors ``[B, T, N, H, D]`` as clips of one long frame, where all of them can be seen so."""
    given = [x for x in tensors if x is not None]
    if given[0].shape[1] > 1 and all(flat(x, mask) for x in given):
        return [None if x is None else x.flatten(1, 2).unsqueeze(1) for x in tensors]
    return list(tensors)


def constants(q: Tensor, tile: Tiles) -> dict[str, Any]:
    dtype = q.dtype
    wide = dots_in_fp32(dtype) or dtype == torch.float32
    dot = tl.float32 if wide else (tl.float16 if dtype == torch.float16 else tl.bfloat16)
    return {"DOT": dot, "PRECISION": dot_precision(dtype), "D": q.shape[-1], "BQ": tile.BQ, "BK": tile.BK, "BD": tile.BD}


@triton.jit
def row_products(b_a, b_x, BQ: tl.constexpr, PRECISION: tl.constexpr):
    """``[BQ, BK]``: <b_a[i], b_x[j]>; of one query by multiplying and adding, since matrix instructions take 16."""
    if BQ == 1:
        b_y = tl.sum(tl.sum(b_a.to(tl.float32), 0)[None, :] * b_x.to(tl.float32), 1)[None, :]
    else:
        b_y = tl.dot(b_a, tl.trans(b_x), input_precision=PRECISION)
    return b_y


@triton.jit
def mixed(b_w, b_x, BQ: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``[BQ, BD]``: sum_j b_w[i, j] * b_x[j]"""
    if BQ == 1:
        b_y = tl.sum(tl.sum(b_w, 0)[:, None] * b_x.to(tl.float32), 0)[None, :]
    else:
        b_y = tl.dot(b_w.to(DOT), b_x, input_precision=PRECISION)
    return b_y


@triton.jit
def outer(b_w, b_a, BQ: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``[BK, BD]``: sum_i b_w[i, j] * b_a[i]"""
    if BQ == 1:
        b_y = tl.sum(b_w, 0)[:, None] * tl.sum(b_a.to(tl.float32), 0)[None, :]
    else:
        b_y = tl.dot(tl.trans(b_w.to(DOT)), b_a, input_precision=PRECISION)
    return b_y


@triton.jit
def exp(b_x):
    return tl.exp2(b_x * 1.4426950408889634)


@triton.jit
def any_valid(mask, i_b, T, TP: tl.constexpr):
    """Whether the clip has a frame that may be looked at."""
    o_t = tl.arange(0, TP)
    return tl.max(tl.load(mask + i_b.to(tl.int64) * T + o_t, mask=o_t < T, other=0).to(tl.int32), 0) > 0
