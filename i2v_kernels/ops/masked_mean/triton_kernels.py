"""Triton kernels of ``masked_mean`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_dense_like
from ..triton_common import WARP, Entry, Launch, cdiv, pow2
from ..triton_launch import run
from .op import empty_output
from .reference import EPS

TILE = 4096  # elements: frames by channels
NARROW = 1024  # channels, where frames need no length


@triton.jit
def frames_of(p_x, p_mask, o_t, left, m_c, HAS_MASK: tl.constexpr):
    """The next frames ``[BT, BC]``, zeros for those that are not valid, and which are."""
    m_t = o_t < left
    if HAS_MASK:
        m_t = m_t & (tl.load(p_mask, mask=m_t, other=0) != 0)
    return tl.load(p_x, mask=m_t[:, None] & m_c[None, :], other=0.0).to(tl.float32), m_t


@triton.jit
def over_length(b_x, EPS: tl.constexpr):
    """One over the length of each row, of at least EPS; NaN stays NaN."""
    b_n = tl.sqrt(tl.sum(b_x * b_x, 1))
    return 1.0 / tl.where(b_n < EPS, EPS, b_n)


@triton.jit
def sum_of(
    x, mask, i_b, o_c, m_c, T, s_xb, s_xt, s_xs,
    HAS_MASK: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Of the clip's valid frames, each of unit length if they are normalised, ``[BC]``; and their number."""
    o_t = tl.arange(0, BT)
    p_x = x + i_b * s_xb + o_t.to(tl.int64)[:, None] * s_xt + o_c[None, :]
    p_mask = mask + i_b * T + o_t if HAS_MASK else x
    b_sum, b_count = tl.zeros((BC,), dtype=tl.float32), tl.zeros((BT,), dtype=tl.float32)
    for i in range(tl.cdiv(T, BT)):
        b_x, m_t = frames_of(p_x, p_mask, o_t, T - i * BT, m_c, HAS_MASK)
        if NORMALIZE:
            b_x = b_x * over_length(b_x, EPS)[:, None]
        b_sum += tl.sum(b_x, 0)
        b_count += m_t.to(tl.float32)
        p_x += s_xs
        p_mask += BT
    return b_sum, tl.sum(b_count, 0)


@triton.jit
def masked_mean_kernel(
    x, mask, out, T, C, s_xb, s_xt, s_xs,
    NORMALIZE: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_c, i_b = i_p % tl.cdiv(C, BC), (i_p // tl.cdiv(C, BC)).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_sum, count = sum_of(x, mask, i_b, o_c, m_c, T, s_xb, s_xt, s_xs, mask is not None, NORMALIZE, EPS, BT, BC)
    count = tl.maximum(count, 1.0)
    if NORMALIZE:
        length = tl.sqrt(tl.sum(b_sum * b_sum, 0))
        count = tl.where(length < count * EPS, count * EPS, length)
    tl.store(out + i_b * C + o_c, (b_sum / count).to(out.dtype.element_ty), mask=m_c)


@triton.jit
def masked_mean_backward_kernel(
    g, x, mask, dx, T, C, s_gb, s_xb, s_xt, s_xs, s_db, s_dt, s_ds,
    NORMALIZE: tl.constexpr, EPS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_c, i_b = i_p % tl.cdiv(C, BC), (i_p // tl.cdiv(C, BC)).to(tl.int64)
    o_t, o_c = tl.arange(0, BT), i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    b_g = tl.load(g + i_b * s_gb + o_c, mask=m_c, other=0.0).to(tl.float32)
    p_mask = mask + i_b * T + o_t if mask is not None else x
    if NORMALIZE:
        b_sum, count = sum_of(x, mask, i_b, o_c, m_c, T, s_xb, s_xt, s_xs, mask is not None, True, EPS, BT, BC)
        length, least = tl.sqrt(tl.sum(b_sum * b_sum, 0)), tl.maximum(count, 1.0) * EPS
        b_o = b_sum / length
        along = tl.sum(b_g * b_o, 0)
        b_g = tl.where(length < least, b_g / least, (b_g - b_o * along) / length)
    elif mask is not None:
        count = tl.zeros((BT,), dtype=tl.float32)
        p_count = p_mask
        for i in range(tl.cdiv(T, BT)):
            count += (tl.load(p_count, mask=o_t < T - i * BT, other=0) != 0).to(tl.float32)
            p_count += BT
        b_g = b_g / tl.maximum(tl.sum(count, 0), 1.0)
    else:
        b_g = b_g / T
    p_x = x + i_b * s_xb + o_t.to(tl.int64)[:, None] * s_xt + o_c[None, :]
    p_dx = dx + i_b * s_db + o_t.to(tl.int64)[:, None] * s_dt + o_c[None, :]
    for i in range(tl.cdiv(T, BT)):
        m_in = o_t < T - i * BT
        if NORMALIZE:
            b_x, m_t = frames_of(p_x, p_mask, o_t, T - i * BT, m_c, mask is not None)
            b_n = tl.sqrt(tl.sum(b_x * b_x, 1))
            b_r = 1.0 / tl.where(b_n < EPS, EPS, b_n)
            b_y = b_x * b_r[:, None]
            b_along = tl.where(b_n < EPS, 0.0, tl.sum(b_y * b_g[None, :], 1))
            b_dx = (b_g[None, :] - b_y * b_along[:, None]) * b_r[:, None]
        else:
            m_t = m_in
            if mask is not None:
                m_t = m_in & (tl.load(p_mask, mask=m_in, other=0) != 0)
            b_dx = b_g[None, :] + tl.zeros((BT, BC), dtype=tl.float32)
        b_dx = tl.where(m_t[:, None], b_dx, 0.0)
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_in[:, None] & m_c[None, :])
        p_x += s_xs
        p_dx += s_ds
        p_mask += BT


def _launch(kernel: object, x: Tensor, mask: Tensor | None, normalize: bool, **args: Any) -> Launch:
    batch, frames, channels = x.shape
    width = pow2(channels) if normalize else min(pow2(channels), NARROW)
    rows = min(pow2(frames), max(TILE // width, 1))
    given = {"x": x, "mask": None if mask is None else mask.view(torch.uint8), **args, "T": frames, "C": channels}
    given |= {"s_xb": x.stride(0), "s_xt": x.stride(1), "s_xs": rows * x.stride(1)}
    if "dx" in args:
        given |= {"s_db": args["dx"].stride(0), "s_dt": args["dx"].stride(1), "s_ds": rows * args["dx"].stride(1)}
    constexprs = {"NORMALIZE": normalize, "EPS": EPS, "BT": rows, "BC": width}
    threads = 256 if width > 2048 else min(max(rows * width // 8, WARP), 128)  # 16 bytes of 16 bits each
    steps = cdiv(frames, rows)
    loops: tuple[int, ...] = (steps,)
    if frames == 1:
        loops = ()
    elif "dx" in args and normalize:
        loops = (steps, steps)
    elif "dx" in args and mask is not None:
        loops = (steps // 4, steps % 4, steps)  # the frames are counted four steps at a time
    return Launch(kernel, batch * cdiv(channels, width), given, constexprs, threads, loops=loops)


def plan(x: Tensor, mask: Tensor | None, out: Tensor, normalize: bool) -> Launch:
    return _launch(masked_mean_kernel, x, mask, normalize, out=out)


def plan_backward(g: Tensor, x: Tensor, mask: Tensor | None, dx: Tensor, normalize: bool) -> Launch:
    return _launch(masked_mean_backward_kernel, x, mask, normalize, g=g, dx=dx, s_gb=g.stride(0))


def forward(x: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    out = empty_output(x)
    if x.numel() > 0:
        run(plan, (x, mask, out), (normalize,))
    else:  # perhaps no frames
        out.zero_()
    return out


def backward(grad: Tensor, x: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    dx = empty_dense_like(x)
    if dx.numel() > 0:
        run(plan_backward, (grad, x, mask, dx), (normalize,))
    return dx


def _entry(shape: tuple[int, int, int], masked: bool, normalize: bool, backward: bool, dtype: torch.dtype) -> Launch:
    x = torch.empty(shape, dtype=dtype, device="meta")
    mask = torch.empty(shape[:2], dtype=torch.bool, device="meta") if masked else None
    if backward:
        return plan_backward(x[:, 0], x, mask, torch.empty_like(x), normalize)
    return plan(x, mask, empty_output(x), normalize)


def _entries(name: str, shape: tuple[int, int, int], masked: bool, normalize: bool) -> list[Entry]:
    what = " ".join(part for part, on in ((name, True), ("masked", masked), ("normalised", normalize)) if on)
    return [
        Entry(
            f"masked_mean {'backward ' * backward}{what}",
            partial(_entry, shape, masked, normalize, backward),
            vectors=normalize or not backward,  # where nothing is normalised backward reads a row alone
        )
        for backward in (False, True)
    ]


AOT = [
    *_entries("768 channels", (64, 8, 768), False, False),
    *_entries("768 channels", (64, 8, 768), True, True),
    *_entries("64 frames", (8, 64, 512), True, False),
    *_entries("1 frame", (64, 1, 512), True, True),
    Entry("masked_mean, all sizes 1", partial(_entry, (1, 1, 1), True, True, False), (torch.bfloat16,), False, False),
    Entry("masked_mean backward, all sizes 1", partial(_entry, (1, 1, 1), True, True, True), (torch.bfloat16,), False, False),
]
