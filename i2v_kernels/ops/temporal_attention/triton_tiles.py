"""What the Triton kernels of ``temporal_attention`` share: tiles, scores, and products that stay within a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import WARP, cdiv, dot_precision, dots_in_fp32, pow2

ONE_WARP = max(32, WARP)


@dataclass(frozen=True)
class Tiles:
    """``TP`` frames padded to a power of two, ``BQ`` query rows and ``BK`` key rows of a tile, ``BD`` channels padded.

    TP <= BQ: a tile holds BQ // TP whole sequences and BK = BQ. Else a sequence has TP // BQ query blocks.
    """

    TP: int
    BQ: int
    BK: int
    BD: int
    threads: int

    @property
    def tokens(self) -> int:
        """Sequences of a tile."""
        return max(self.BQ // self.TP, 1)

    @property
    def blocks(self) -> int:
        """Query blocks of a sequence."""
        return max(self.TP // self.BQ, 1)


def tiles(frames: int, dim: int, itemsize: int, backward: bool) -> Tiles:
    """The tiles of a call: chosen by shape and dtype alone, so that the same call always gives the same bits."""
    tp, bd = pow2(frames), max(pow2(dim), 16)
    if itemsize == 4:  # products on the ordinary units hold their operands in registers: small tiles, many threads
        return Tiles(tp, 16, 16, bd, 256 if backward and (tp > 16 or bd > 64) else 128)
    if backward and bd > 128:
        return Tiles(tp, 16, 16, bd, 256)
    # one warp where it can hold the tile: Triton lays several side by side, and then each step waits for all of them
    if tp <= 16 and bd <= 128:
        return Tiles(tp, 16, 16, bd, 64 if backward and bd > 64 else ONE_WARP)
    if tp <= 32 and bd <= 64:
        return Tiles(tp, 32, 32, bd, 64 if backward else ONE_WARP)
    rows = 32 if tp <= 32 or backward or bd > 128 else 64
    threads = rows * (4 if bd > 128 or (backward and bd > 64) else 2)  # a matrix instruction has 16 rows for a warp
    return Tiles(tp, rows, rows if tp <= rows else 32, bd, threads)


def common(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, left: int, right: int
) -> dict[str, Any]:
    """The arguments that all kernels take."""
    return {
        "bias": bias,
        "mask": None if mask is None else mask.view(torch.uint8),
        "TQ": q.shape[1],
        "TK": k.shape[1],
        "N": q.shape[2],
        "H": q.shape[3],
        "scale": float(scale),
        "LEFT": None if left < 0 else left,
        "RIGHT": None if right < 0 else right,
    }


def constants(q: Tensor, offsets: Sequence[int] | None, tile: Tiles) -> dict[str, Any]:
    """The compile-time constants that all kernels take, but UNIT."""
    dtype = q.dtype
    wide = dots_in_fp32(dtype) or dtype == torch.float32
    dot = tl.float32 if wide else (tl.float16 if dtype == torch.float16 else tl.bfloat16)
    constexprs: dict[str, Any] = {"OFFSETS": None if offsets is None else tuple(offsets)}
    constexprs |= {"HEADS": 0 if offsets is None else len(offsets), "DOT": dot, "PRECISION": dot_precision(dtype)}
    return constexprs | {"D": q.shape[4], "TP": tile.TP, "BQ": tile.BQ, "BK": tile.BK, "BD": tile.BD}


def strides(**tensors: Tensor) -> tuple[dict[str, int], int]:
    """``s_qb, s_qt, s_qn, s_qh`` of a tensor named q, and so on, in units of the second result's elements.

    Of a number Triton sees whether 16 divides it, and nothing else: strides of D = 72 are not told from odd ones. Counted in
    eights they are, and loads have 16 bytes.
    """
    steps = [step for t in tensors.values() for size, step in zip(t.shape[:4], t.stride()) if size > 1]
    unit = 8 if all(step % 8 == 0 for step in steps) else 1
    names = (f"s_{name}{axis}" for name in tensors for axis in "btnh")
    return dict(zip(names, (step // unit for t in tensors.values() for step in t.stride()[:4]))), unit


def units(q: Tensor, tile: Tiles) -> int:
    """Tiles of tokens of all clips."""
    return q.shape[0] * cdiv(q.shape[2], tile.tokens)


@triton.jit
def rows(i_block, BLOCK: tl.constexpr, TP: tl.constexpr):
    """Of the rows of a tile: which of its sequences, and which frame."""
    o_r = tl.arange(0, BLOCK)
    if TP <= BLOCK:
        o_j = o_r // TP
        o_t = o_r % TP
    else:
        o_j = tl.zeros([BLOCK], dtype=tl.int32)
        o_t = i_block * BLOCK + o_r
    return o_j, o_t


@triton.jit
def pointers(x, i_b, i_h, o_t, o_n, s_b, s_t, s_n, s_h, BD: tl.constexpr, UNIT: tl.constexpr):
    """``[R, BD]`` pointers to frames o_t of tokens o_n; strides are in units of UNIT elements."""
    row = i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h + o_t.to(tl.int64) * s_t + o_n.to(tl.int64) * s_n
    row *= UNIT
    return x + row[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def read(p_x, m_r, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr):
    """``[R, BD]`` values; rows outside m_r and channels behind D are zero."""
    m_d = tl.arange(0, BD) < D
    return tl.load(p_x, mask=m_r[:, None] & m_d[None, :], other=0).to(DOT)


@triton.jit
def write(p_x, b_x, m_r, D: tl.constexpr, BD: tl.constexpr):
    m_d = tl.arange(0, BD) < D
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


@triton.jit
def frames_of(o_s, i_h, TK, OFFSETS: tl.constexpr, HEADS: tl.constexpr):
    """The frames that head i_h reads as its keys o_s."""
    if OFFSETS is not None:
        o_f = o_s
        for h in tl.static_range(HEADS):
            o_f = tl.where(i_h == h, o_s + OFFSETS[h], o_f)
        o_s = tl.minimum(tl.maximum(o_f, 0), TK - 1)
    return o_s


@triton.jit
def valid_keys(o_jq, o_t, o_jk, o_s, o_f, mask, i_b, TQ, TK, LEFT, RIGHT):
    """``[BQ, BK]``: (key of the same sequence, key that the query may attend to). Keys o_s are read from frames o_f.

    Rows behind the last frame count as queries too, so that their softmax stays finite; nothing of them is written.
    """
    m_same = (o_jq[:, None] == o_jk[None, :]) & (o_s < TK)[None, :]
    m_valid = m_same
    if LEFT is not None:
        m_valid = m_valid & (o_s[None, :] - o_t[:, None] - (TK - TQ) >= -LEFT)
    if RIGHT is not None:
        m_valid = m_valid & (o_s[None, :] - o_t[:, None] - (TK - TQ) <= RIGHT)
    if mask is not None:
        b_mask = tl.load(mask + i_b.to(tl.int64) * TK + o_f, mask=o_s < TK, other=0)
        m_valid = m_valid & (b_mask != 0)[None, :]
    return m_same, m_valid


@triton.jit
def scores(b_qk, bias, i_h, o_t, o_s, m_valid, scale, TQ, TK):
    """``[BQ, BK]`` products of queries and keys to scores times log2(e), -inf where the query may not look."""
    b_s = b_qk * (scale * 1.4426950408889634)
    if bias is not None:
        p_bias = bias + i_h.to(tl.int64) * TQ * TK + o_t[:, None] * TK + o_s[None, :]
        b_s += tl.load(p_bias, mask=(o_t < TQ)[:, None] & (o_s < TK)[None, :], other=0) * 1.4426950408889634
    return tl.where(m_valid, b_s, float("-inf"))


@triton.jit
def dot_within(
    b_a, b_x, p_x, m_r, o_j, D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """``b_a @ b_x`` for a block-diagonal b_a of S sequences.

    Zero times NaN is NaN, so a NaN or an Inf of one sequence would reach all others of the tile. If one comes up, the
    product is taken again, sequence by sequence.
    """
    b_y = tl.dot(b_a, b_x, input_precision=PRECISION)
    if S > 1:  # noqa: SIM102
        if tl.max(tl.max((b_y != b_y).to(tl.int32), 1), 0) > 0:
            for j in range(S):
                b_j = read(p_x, m_r & (o_j == j), D, BD, DOT)
                b_y = tl.where((o_j == j)[:, None], tl.dot(b_a, b_j, input_precision=PRECISION), b_y)
    return b_y


@triton.jit
def write_within(
    p_y, m_y, b_a, p_x, m_x, o_j,
    D: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes ``b_a @ b_x`` for a block-diagonal b_a of S sequences, sequence by sequence: see dot_within."""
    for j in range(S):
        b_y = tl.dot(b_a, read(p_x, m_x & (o_j == j), D, BD, DOT), input_precision=PRECISION)
        write(p_y, b_y, m_y & (o_j == j), D, BD)


@triton.jit
def any_infinite(b_x):
    return tl.max(tl.max((tl.abs(b_x) < float("inf")).to(tl.int32) ^ 1, 1), 0) > 0


@triton.jit
def read_from(o_j, o_t, o_f, m_k):
    """``[BK, frames]``: whether a head reads its key from the frame."""
    return (o_j[:, None] == o_j[None, :]) & (o_f[:, None] == o_t[None, :]) & m_k[:, None]


@triton.jit
def to_frames(b_x, m_read, PRECISION: tl.constexpr):
    """``b_x @ m_read``, but what is not finite reaches only frames that were read: sums of it are counted by themselves."""
    m_nan = b_x != b_x
    m_inf = tl.abs(b_x) == float("inf")
    b_kind = tl.where(m_nan, 4096.0, tl.where(m_inf, tl.where(b_x > 0, 1.0, 64.0), 0.0))
    b_count = tl.dot(b_kind.to(b_x.dtype), m_read, input_precision=PRECISION).to(tl.int32)  # of each kind fewer than 64
    b_y = tl.dot(tl.where(m_nan | m_inf, 0.0, b_x).to(b_x.dtype), m_read, input_precision=PRECISION)
    m_up = (b_count & 63) > 0
    m_down = (b_count & 4032) > 0
    b_y = tl.where(m_up, float("inf"), tl.where(m_down, float("-inf"), b_y))
    return tl.where((b_count >= 4096) | (m_up & m_down), float("nan"), b_y).to(b_x.dtype)
