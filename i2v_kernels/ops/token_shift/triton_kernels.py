"""Triton kernels of ``token_shift`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import empty_dense_like
from ..triton_common import Entry, Launch, cdiv, pow2, run

TILE_BYTES = 8192  # four 16-byte loads for each of 128 threads
WIDEST = 512  # channels of a tile


@triton.jit
def token_shift_kernel(
    x, y,
    T, N, C, start, stop,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    ENDS: tl.constexpr,  # the channel behind each group
    OFFSETS: tl.constexpr,  # its offset; in [0, T) for PADDING "wrap"
    G: tl.constexpr, PADDING: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    n_n = tl.cdiv(N, BN)
    i_c = i_p % n_c
    i_n = i_p // n_c % n_n
    i_t = i_p // n_c // n_n % T
    i_b = (i_p // n_c // n_n // T).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_y = (o_n < N)[:, None] & (o_c < C)[None, :]  # [BN, BC]

    b_offset = tl.zeros([BC], dtype=tl.int32)
    for g in tl.static_range(G):
        b_offset = tl.where(o_c < ENDS[G - 1 - g], OFFSETS[G - 1 - g], b_offset)
    o_s = i_t - b_offset  # [BC] the frame each channel comes from
    if PADDING == "wrap":
        o_s = tl.where(o_s < 0, o_s + T, o_s)
    elif PADDING == "edge":
        o_s = tl.minimum(tl.maximum(o_s, 0), T - 1)
    m_n = (o_n >= start) & (o_n < stop)
    o_s = tl.where(m_n[:, None], o_s[None, :], i_t)  # [BN, BC]
    m_x = m_y
    if PADDING == "zeros":
        m_x = m_y & (o_s >= 0) & (o_s < T)

    p_x = x + i_b * s_xb + o_s.to(tl.int64) * s_xt + o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
    p_y = y + i_b * s_yb + i_t.to(tl.int64) * s_yt + o_n.to(tl.int64)[:, None] * s_yn + o_c[None, :]
    tl.store(p_y, tl.load(p_x, mask=m_x, other=0), mask=m_y)


@triton.jit
def token_shift_edge_adjoint_kernel(
    x, y,
    T, N, C, start, stop,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the sums
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    n_n = tl.cdiv(N, BN)
    i_c = i_p % n_c
    i_n = i_p // n_c % n_n
    i_t = i_p // n_c // n_n % T
    i_b = (i_p // n_c // n_n // T).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_y = (o_n < N)[:, None] & (o_c < C)[None, :]  # [BN, BC]
    m_n = (o_n >= start) & (o_n < stop)
    p_x = x + i_b * s_xb + o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
    p_y = y + i_b * s_yb + i_t.to(tl.int64) * s_yt + o_n.to(tl.int64)[:, None] * s_yn + o_c[None, :]

    m_still = m_y & ((o_c >= ENDS[G - 1])[None, :] | ~m_n[:, None])
    b_y = tl.load(p_x + i_t.to(tl.int64) * s_xt, mask=m_still, other=0).to(SUM)
    for g in tl.static_range(G):
        m_g = o_c < ENDS[g]
        if g > 0:
            m_g = m_g & (o_c >= ENDS[g - 1])
        m_g = m_y & m_n[:, None] & m_g[None, :]
        # the frames that read frame i_t; the first and the last frame were read by those outside the clip too
        first = tl.where(i_t > 0, tl.maximum(i_t + OFFSETS[g], 0), 0)
        last = tl.where(i_t < T - 1, tl.minimum(i_t + OFFSETS[g], T - 1), T - 1)
        p_s = p_x + first.to(tl.int64) * s_xt
        for _ in range(first, last + 1):
            b_y += tl.load(p_s, mask=m_g, other=0).to(SUM)
            p_s += s_xt
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


def tile(tokens: int, channels: int, itemsize: int) -> tuple[int, int]:
    """``(BN, BC)``: tokens and channels of one tile."""
    width = min(pow2(channels), WIDEST)
    return min(max(TILE_BYTES // (width * itemsize), 1), pow2(tokens)), width


def plan(
    x: Tensor,
    y: Tensor,
    channels: Sequence[int],
    offsets: Sequence[int],
    padding: str,
    start: int,
    stop: int,
    adjoint: bool,
) -> Launch:
    """The launch that writes y from x (with ``adjoint``: x is the gradient of the output)."""
    batch, frames, tokens, width = x.shape
    ends, moves, end = [], [], 0
    for count, offset in zip(channels, offsets):
        end += count
        offset = -offset if adjoint and padding != "edge" else offset
        ends.append(end)
        moves.append(offset % frames if padding == "wrap" else max(-frames, min(offset, frames)))
    if not ends:
        ends, moves = [0], [0]
    constexprs: dict[str, Any] = {"ENDS": tuple(ends), "OFFSETS": tuple(moves), "G": len(ends)}
    kernel = token_shift_kernel
    if adjoint and padding == "edge":
        kernel = token_shift_edge_adjoint_kernel
        constexprs["SUM"] = tl.float64 if x.dtype == torch.float64 else tl.float32
    else:
        constexprs["PADDING"] = padding
    constexprs["BN"], constexprs["BC"] = tile(tokens, width, x.element_size())
    args: dict[str, Any] = {"x": x, "y": y, "T": frames, "N": tokens, "C": width, "start": start, "stop": stop}
    for name, tensor in (("x", x), ("y", y)):
        args.update(zip((f"s_{name}b", f"s_{name}t", f"s_{name}n"), tensor.stride()))
    programs = batch * frames * cdiv(tokens, constexprs["BN"]) * cdiv(width, constexprs["BC"])
    return Launch(kernel, programs, args, constexprs)


def _shift(
    x: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int, adjoint: bool
) -> Tensor:
    out = empty_dense_like(x)
    if out.numel() > 0:
        run([plan(x, out, channels, offsets, padding, start, stop, adjoint)], x.device)
    return out


def forward(
    x: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int
) -> Tensor:
    """``[B, T, N, C]`` -> the same, shifted."""
    return _shift(x, channels, offsets, padding, start, stop, adjoint=False)


def backward(
    grad: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int
) -> Tensor:
    """The adjoint of ``forward``."""
    return _shift(grad, channels, offsets, padding, start, stop, adjoint=True)


def _aot(padding: str, adjoint: bool, width: int = 768, count: int = 96) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x = torch.empty(64, 8, 197, width, dtype=dtype, device="meta")
        return plan(x, empty_dense_like(x), (count, count), (1, -1), padding, 0, 197, adjoint)

    return Entry(f"token_shift {padding}{' adjoint' if adjoint else ''} C{width}/{count}", launch)


def _ones(dtype: torch.dtype, adjoint: bool) -> Launch:
    x = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    return plan(x, x, (1,), (1,), "edge", 0, 1, adjoint)


AOT = [
    _aot("zeros", adjoint=False),
    _aot("edge", adjoint=False),
    _aot("wrap", adjoint=False),
    _aot("edge", adjoint=True),
    _aot("zeros", adjoint=False, width=1280, count=160),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("token_shift, all sizes 1", partial(_ones, adjoint=False), (torch.bfloat16,), vectors=False),
    Entry("token_shift adjoint, all sizes 1", partial(_ones, adjoint=True), (torch.bfloat16,), vectors=False),
]
