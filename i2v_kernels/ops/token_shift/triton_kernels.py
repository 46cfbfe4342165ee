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
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run

TILE_BYTES = 8192  # four 16-byte loads for each of 128 threads
WIDEST = 512  # channels of a tile
LOAD_BYTES = 16


@triton.jit
def _sources(
    i_t, o_c, T,
    ENDS: tl.constexpr,  # the channel behind each group
    OFFSETS: tl.constexpr,  # its offset; in [0, T) for PADDING "wrap"
    G: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The frames that channels ``o_c`` of frames ``i_t`` come from, outside the clip for zeros; channels not named stay."""
    b_offset = tl.zeros(o_c.shape, dtype=tl.int32)
    for g in tl.static_range(G):
        b_offset = tl.where(o_c < ENDS[G - 1 - g], OFFSETS[G - 1 - g], b_offset)
    o_s = i_t - b_offset
    if PADDING == "wrap":
        o_s = tl.where(o_s < 0, o_s + T, o_s)
    elif PADDING == "edge":
        o_s = tl.minimum(tl.maximum(o_s, 0), T - 1)
    return o_s


@triton.jit
def token_shift_kernel(
    x, y,
    T, N, C, start, stop, step,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr, PADDING: tl.constexpr,
    RESIDUAL: tl.constexpr,
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

    o_s = _sources(i_t, o_c, T, ENDS, OFFSETS, G, PADDING)  # [BC]
    m_n = (o_n >= start) & (o_n < stop) & ((o_n - start) % step == 0)
    o_s = tl.where(m_n[:, None], o_s[None, :], i_t)  # [BN, BC]
    m_x = m_y
    if PADDING == "zeros":
        m_x = m_y & (o_s >= 0) & (o_s < T)

    p_x = x + i_b * s_xb + o_s.to(tl.int64) * s_xt + o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
    p_y = y + i_b * s_yb + i_t.to(tl.int64) * s_yt + o_n.to(tl.int64)[:, None] * s_yn + o_c[None, :]
    b_y = tl.load(p_x, mask=m_x, other=0)
    if RESIDUAL:
        p_own = x + i_b * s_xb + i_t.to(tl.int64) * s_xt + o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
        b_y = (tl.load(p_own, mask=m_y, other=0).to(SUM) + b_y.to(SUM)).to(y.dtype.element_ty)
    tl.store(p_y, b_y, mask=m_y)


@triton.jit
def token_shift_edge_adjoint_kernel(
    x, y,
    T, N, C, start, stop, step,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr,
    RESIDUAL: tl.constexpr, SUM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
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
    m_n = (o_n >= start) & (o_n < stop) & ((o_n - start) % step == 0)
    p_x = x + i_b * s_xb + o_n.to(tl.int64)[:, None] * s_xn + o_c[None, :]
    p_y = y + i_b * s_yb + i_t.to(tl.int64) * s_yt + o_n.to(tl.int64)[:, None] * s_yn + o_c[None, :]

    m_still = m_y & ((o_c >= ENDS[G - 1])[None, :] | ~m_n[:, None])
    b_y = tl.load(p_x + i_t.to(tl.int64) * s_xt, mask=m_still, other=0).to(SUM)
    if RESIDUAL:
        b_y += tl.load(p_x + i_t.to(tl.int64) * s_xt, mask=m_y, other=0).to(SUM)
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


@triton.jit
def token_shift_in_place_kernel(
    x,
    T, tokens, start, step,
    s_xb, s_xt, s_xn,
    ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr, PADDING: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c = tl.cdiv(ENDS[G - 1], BC)
    i_c = i_p % n_c
    i_n = (i_p // n_c % tokens).to(tl.int64) * step + start
    i_b = (i_p // n_c // tokens).to(tl.int64)
    o_t = tl.arange(0, BT)
    o_c = i_c * BC + tl.arange(0, BC)
    m_x = (o_t < T)[:, None] & (o_c < ENDS[G - 1])[None, :]  # [BT, BC]
    o_s = _sources(o_t[:, None], o_c[None, :], T, ENDS, OFFSETS, G, PADDING)
    m_s = m_x
    if PADDING == "zeros":
        m_s = m_x & (o_s >= 0) & (o_s < T)
    p_x = x + i_b * s_xb + i_n * s_xn + o_c[None, :]
    b_x = tl.load(p_x + o_s.to(tl.int64) * s_xt, mask=m_s, other=0)
    tl.debug_barrier()  # every thread has read before one writes
    tl.store(p_x + o_t.to(tl.int64)[:, None] * s_xt, b_x, mask=m_x)


def tile(tokens: int, channels: int, itemsize: int) -> tuple[int, int]:
    """``(BN, BC)``: tokens and channels of one tile."""
    width = min(pow2(channels), WIDEST)
    return min(max(TILE_BYTES // (width * itemsize), 1), pow2(tokens)), width


def _groups(channels: Sequence[int], offsets: Sequence[int], padding: str, frames: int) -> dict[str, Any]:
    ends, moves, end = [], [], 0
    for count, offset in zip(channels, offsets):
        end += count
        ends.append(end)
        moves.append(offset % frames if padding == "wrap" else max(-frames, min(offset, frames)))
    if not ends:
        ends, moves = [0], [0]
    return {"ENDS": tuple(ends), "OFFSETS": tuple(moves), "G": len(ends)}


def plan(
    x: Tensor,
    y: Tensor,
    channels: Sequence[int],
    offsets: Sequence[int],
    padding: str,
    start: int,
    stop: int,
    step: int,
    residual: bool,
    *,
    adjoint: bool,
) -> Launch:
    """The launch that writes y from x (with ``adjoint``: x is the gradient of the output)."""
    batch, frames, tokens, width = x.shape
    if adjoint and padding != "edge":
        offsets = [-offset for offset in offsets]
    constexprs = _groups(channels, offsets, padding, frames)
    constexprs["RESIDUAL"] = residual
    constexprs["SUM"] = tl.float64 if x.dtype == torch.float64 else tl.float32
    kernel = token_shift_kernel
    if adjoint and padding == "edge":
        kernel = token_shift_edge_adjoint_kernel
    else:
        constexprs["PADDING"] = padding
    constexprs["BN"], constexprs["BC"] = tile(tokens, width, x.element_size())
    args: dict[str, Any] = {"x": x, "y": y, "T": frames, "N": tokens, "C": width}
    args |= {"start": start, "stop": stop, "step": step}
    for name, tensor in (("x", x), ("y", y)):
        args.update(zip((f"s_{name}b", f"s_{name}t", f"s_{name}n"), tensor.stride()))
    programs = batch * frames * cdiv(tokens, constexprs["BN"]) * cdiv(width, constexprs["BC"])
    return Launch(kernel, programs, args, constexprs)


def plan_in_place(
    x: Tensor, channels: Sequence[int], offsets: Sequence[int], padding: str, start: int, stop: int, step: int
) -> Launch:
    """The launch that shifts x itself: one program for each token that is shifted, with all of its frames."""
    batch, frames = x.shape[:2]
    tokens, named = cdiv(stop - start, step), sum(channels)
    widest = max(TILE_BYTES // pow2(frames), LOAD_BYTES) // x.element_size()
    constexprs = _groups(channels, offsets, padding, frames)
    constexprs |= {"PADDING": padding, "BT": pow2(frames), "BC": min(pow2(named), widest)}
    args: dict[str, Any] = {"x": x, "T": frames, "tokens": tokens, "start": start, "step": step}
    args.update(zip(("s_xb", "s_xt", "s_xn"), x.stride()))
    return Launch(token_shift_in_place_kernel, batch * tokens * cdiv(named, constexprs["BC"]), args, constexprs)


def _shift(planned: Any, x: Tensor, channels: Sequence[int], offsets: Sequence[int], *rest: Any) -> Tensor:
    out = empty_dense_like(x)
    if out.numel() > 0:
        run(planned, (x, out), (tuple(channels), tuple(offsets), *rest))
    return out


forward = partial(_shift, partial(plan, adjoint=False))  # [B, T, N, C] -> the same, shifted
backward = partial(_shift, partial(plan, adjoint=True))  # its adjoint


def shift_in_place(x: Tensor, channels: Sequence[int], offsets: Sequence[int], *rest: Any) -> None:
    """``token_shift_``."""
    if x.numel() > 0:
        run(plan_in_place, (x,), (tuple(channels), tuple(offsets), *rest))


def _aot(padding: str, adjoint: bool, width: int = 768, count: int = 96, step: int = 1, residual: bool = False) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x = torch.empty(64, 8, 197, width, dtype=dtype, device="meta")
        return plan(x, empty_dense_like(x), (count, count), (1, -1), padding, 0, 197, step, residual, adjoint=adjoint)

    name = f"token_shift {padding}{' adjoint' if adjoint else ''}{' residual' if residual else ''} C{width}/{count}"
    return Entry(name if step == 1 else f"{name} step {step}", launch)


def _aot_in_place(padding: str, stop: int, step: int = 1) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x = torch.empty(64, 8, 197, 768, dtype=dtype, device="meta")
        return plan_in_place(x, (96, 96), (1, -1), padding, 0, stop, step)

    return Entry(f"token_shift_ {padding} C768/96, tokens {stop}, step {step}", launch)


def _ones(dtype: torch.dtype, adjoint: bool, residual: bool = False) -> Launch:
    x = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    return plan(x, x, (1,), (1,), "edge", 0, 1, 1, residual, adjoint=adjoint)


def _ones_in_place(dtype: torch.dtype) -> Launch:
    return plan_in_place(torch.empty(1, 1, 1, 1, dtype=dtype, device="meta"), (1,), (1,), "edge", 0, 1, 1)


AOT = [
    _aot("zeros", adjoint=False),
    _aot("edge", adjoint=False),
    _aot("wrap", adjoint=False),
    _aot("edge", adjoint=True),
    _aot("zeros", adjoint=False, width=1280, count=160),
    _aot("zeros", adjoint=False, residual=True),
    _aot("edge", adjoint=True, residual=True),
    _aot("edge", adjoint=False, step=28),
    _aot_in_place("zeros", 197),
    _aot_in_place("wrap", 197, 28),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("token_shift, all sizes 1", partial(_ones, adjoint=False), (torch.bfloat16,), vectors=False),
    Entry("token_shift adjoint, all sizes 1", partial(_ones, adjoint=True), (torch.bfloat16,), vectors=False),
    Entry("token_shift residual, all sizes 1", partial(_ones, adjoint=True, residual=True), (torch.bfloat16,), vectors=False),
    Entry("token_shift_, all sizes 1", _ones_in_place, (torch.bfloat16,), vectors=False),
]
