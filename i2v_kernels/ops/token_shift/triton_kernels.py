"""Triton kernels of ``token_shift`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_dense_like
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run

TILE_BYTES = 8192  # four 16-byte loads for each of 128 threads
WIDTHS = (512, 256, 128, 64)  # channels of a tile, of rows that are not narrower
LOAD_BYTES = 16


@triton.jit
def _offsets(
    o_c,
    ENDS: tl.constexpr,  # the channel behind each group
    OFFSETS: tl.constexpr,  # its offset; in [0, T) for PADDING "wrap"
    G: tl.constexpr,
):  # fmt: skip
    """The offsets of channels ``o_c``: 0 of those not named."""
    b_offset = tl.zeros(o_c.shape, dtype=tl.int32)
    for g in tl.static_range(G):
        b_offset = tl.where(o_c < ENDS[G - 1 - g], OFFSETS[G - 1 - g], b_offset)
    return b_offset


@triton.jit
def _sources(i_t, b_offset, T, PADDING: tl.constexpr):
    """The frames that frames ``i_t`` come from, outside the clip for zeros."""
    o_s = i_t - b_offset
    if PADDING == "wrap":
        o_s = tl.where(o_s < 0, o_s + T, o_s)
    elif PADDING == "edge":
        o_s = tl.minimum(tl.maximum(o_s, 0), T - 1)
    return o_s


@triton.jit
def _places(o_n, o_c, i_b, s_b, s_n, UNIT: tl.constexpr):
    """Offsets ``[BN, BC]`` of frame 0 of clip i_b. Strides count UNITs, so that the compiler sees what divides them."""
    return i_b * s_b * UNIT + (o_n.to(tl.int64) * s_n * UNIT)[:, None] + o_c[None, :]


@triton.jit
def token_shift_kernel(
    x, y,
    T, N, start, stop, step,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    C: tl.constexpr, UNIT: tl.constexpr,
    ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr, PADDING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the sums
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c: tl.constexpr = tl.cdiv(C, BC)
    n_n = tl.cdiv(N, BN)
    i_c = i_p % n_c
    i_n = i_p // n_c % n_n
    i_t = i_p // n_c // n_n % T
    i_b = (i_p // n_c // n_n // T).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_y = (o_n < N)[:, None] & (o_c < C)[None, :]  # [BN, BC]

    o_s = _sources(i_t, _offsets(o_c, ENDS, OFFSETS, G), T, PADDING)  # [BC]
    m_n = (o_n >= start) & (o_n < stop) & ((o_n - start) % step == 0)
    o_s = tl.where(m_n[:, None], o_s[None, :], i_t)  # [BN, BC]
    m_x = m_y
    if PADDING == "zeros":
        m_x = m_y & (o_s >= 0) & (o_s < T)

    p_x = x + _places(o_n, o_c, i_b, s_xb, s_xn, UNIT)
    p_y = y + _places(o_n, o_c, i_b, s_yb, s_yn, UNIT) + i_t.to(tl.int64) * s_yt * UNIT
    b_y = tl.load(p_x + o_s.to(tl.int64) * s_xt * UNIT, mask=m_x, other=0)
    if RESIDUAL:
        b_own = tl.load(p_x + i_t.to(tl.int64) * s_xt * UNIT, mask=m_y, other=0)
        b_y = (b_own.to(SUM) + b_y.to(SUM)).to(y.dtype.element_ty)
    tl.store(p_y, b_y, mask=m_y)


@triton.jit
def token_shift_edge_adjoint_kernel(
    x, y,
    T, N, start, stop, step,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    C: tl.constexpr, UNIT: tl.constexpr,
    ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr,
    FARTHEST: tl.constexpr,  # of the offsets' absolute values
    RESIDUAL: tl.constexpr, SUM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c: tl.constexpr = tl.cdiv(C, BC)
    n_n = tl.cdiv(N, BN)
    i_c = i_p % n_c
    i_n = i_p // n_c % n_n
    i_t = i_p // n_c // n_n % T
    i_b = (i_p // n_c // n_n // T).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    m_y = (o_n < N)[:, None] & (o_c < C)[None, :]  # [BN, BC]
    m_n = (o_n >= start) & (o_n < stop) & ((o_n - start) % step == 0)

    # One frame at most reads frame i_t, but the first and the last, which those outside the clip read too: themselves and the
    # next ones inwards.
    at_end = (i_t == 0) | (i_t == T - 1)
    b_offset = _offsets(o_c, ENDS, OFFSETS, G)  # [BC]
    o_s = tl.where(at_end, i_t, i_t + b_offset)
    m_s = (o_s >= 0) & (o_s < T)
    m_s = m_s & ((i_t > 0) | (b_offset >= 0) | (T == 1)) & ((i_t < T - 1) | (b_offset <= 0) | (T == 1))
    o_s = tl.where(m_n[:, None], o_s[None, :], i_t)  # [BN, BC]

    p_x = x + _places(o_n, o_c, i_b, s_xb, s_xn, UNIT)
    b_y = tl.load(p_x + o_s.to(tl.int64) * s_xt * UNIT, mask=m_y & (m_s[None, :] | ~m_n[:, None]), other=0).to(SUM)
    if RESIDUAL:
        b_y += tl.load(p_x + i_t.to(tl.int64) * s_xt * UNIT, mask=m_y, other=0).to(SUM)
    inwards = tl.where(i_t == 0, 1, -1)
    o_more = tl.where(m_n[:, None], (b_offset * inwards)[None, :], 0)
    for i in range(tl.where(at_end, tl.minimum(FARTHEST, T - 1), 0)):
        p_s = p_x + (i_t + inwards * (i + 1)).to(tl.int64) * s_xt * UNIT
        b_y += tl.load(p_s, mask=m_y & (o_more > i), other=0).to(SUM)
    p_y = y + _places(o_n, o_c, i_b, s_yb, s_yn, UNIT) + i_t.to(tl.int64) * s_yt * UNIT
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def token_shift_in_place_kernel(
    x,
    T, tokens, start, step,
    s_xb, s_xt, s_xn,
    UNIT: tl.constexpr, ENDS: tl.constexpr, OFFSETS: tl.constexpr, G: tl.constexpr, PADDING: tl.constexpr,
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
    o_s = _sources(o_t[:, None], _offsets(o_c, ENDS, OFFSETS, G)[None, :], T, PADDING)
    m_s = m_x
    if PADDING == "zeros":
        m_s = m_x & (o_s >= 0) & (o_s < T)
    p_x = x + i_b * s_xb * UNIT + i_n * s_xn * UNIT + o_c[None, :]
    b_x = tl.load(p_x + o_s.to(tl.int64) * s_xt * UNIT, mask=m_s, other=0)
    tl.debug_barrier()  # every thread has read before one writes
    tl.store(p_x + (o_t.to(tl.int64) * s_xt * UNIT)[:, None], b_x, mask=m_x)


def tile(tokens: int, channels: int, itemsize: int) -> tuple[int, int]:
    """``(BN, BC)``: tokens and channels of one tile: those that leave the fewest lanes idle, of these the widest."""

    def rows(width: int) -> int:
        return min(max(TILE_BYTES // (width * itemsize), 1), pow2(tokens))

    def lanes(width: int) -> int:
        return cdiv(channels, width) * width * cdiv(tokens, rows(width)) * rows(width)

    width = min((width for width in WIDTHS if width <= pow2(channels)), key=lanes, default=pow2(channels))
    return rows(width), width


def _strides(*tensors: tuple[str, Tensor]) -> tuple[dict[str, int], int]:
    """The strides of clip, frame and token, in units that are counted too where Triton would not see that they divide."""
    unit = math.gcd(LOAD_BYTES, *(stride for _, tensor in tensors for stride in tensor.stride()[:3]))
    if unit == LOAD_BYTES:
        unit = 1
    names = (f"s_{name}{which}" for name, _ in tensors for which in "btn")
    return dict(zip(names, (stride // unit for _, tensor in tensors for stride in tensor.stride()[:3]))), unit


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
        constexprs["FARTHEST"] = max(abs(offset) for offset in constexprs["OFFSETS"])
    else:
        constexprs["PADDING"] = padding
    constexprs["BN"], constexprs["BC"] = tile(tokens, width, x.element_size())
    strides, unit = _strides(("x", x), ("y", y))
    constexprs |= {"C": width, "UNIT": unit}
    args: dict[str, Any] = {"x": x, "y": y, "T": frames, "N": tokens, "start": start, "stop": stop, "step": step, **strides}
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
    strides, constexprs["UNIT"] = _strides(("x", x))
    args: dict[str, Any] = {"x": x, "T": frames, "tokens": tokens, "start": start, "step": step, **strides}
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
    _aot("zeros", adjoint=False, width=384, count=48),
    _aot("zeros", adjoint=False, width=1024, count=128),
    _aot("zeros", adjoint=False, width=760, count=96),
    _aot("edge", adjoint=True, width=760, count=96, residual=True),
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
