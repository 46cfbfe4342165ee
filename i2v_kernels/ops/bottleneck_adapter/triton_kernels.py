"""Triton kernel of ``bottleneck_adapter`` and its launcher. How it works and why: README.md beside this file."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import memory_order
from ..products import viewable
from ..triton_activations import activate
from ..triton_common import Entry, Launch, cdiv, dots_in_fp32, pow2
from ..triton_launch import run
from . import blocks

WIDEST = 256  # bottleneck of a tile


@triton.jit
def _down(b_x, down, o_r, o_c, s_down, R: tl.constexpr, BR: tl.constexpr, FIRST: tl.constexpr, m_c):
    """The part ``[BM, BR]`` of the bottleneck from channels o_c of the input."""
    m_w = m_c[None, :]
    if FIRST + BR > R:
        m_w = m_w & (o_r < R)[:, None]
    b_w = tl.load(down + o_r[:, None] * s_down + o_c[None, :], mask=m_w, other=0)
    return tl.dot(b_x, tl.trans(b_w.to(b_x.dtype)))


@triton.jit
def _narrow(
    b_h, h, down_bias, i_m, o_m, o_r, m_m, s_h,
    R: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A part of the bottleneck, kept if it is wanted, as the operand of the second product."""
    m_r = o_r < R
    if down_bias is not None:
        b_h += tl.load(down_bias + o_r, mask=m_r, other=0).to(tl.float32)[None, :]
    if h is not None:
        p_h = h + i_m * s_h + o_m[:, None] * s_h
        tl.store(p_h + o_r[None, :], b_h.to(h.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])
    return activate(b_h, ACTIVATION).to(DOT)


@triton.jit
def _up(b_h, up, o_r, o_c, s_up, R: tl.constexpr, BR: tl.constexpr, FIRST: tl.constexpr, m_c):
    """The product ``[BM, BC]`` of a part of the bottleneck for channels o_c of the output."""
    m_w = m_c[:, None]
    if FIRST + BR > R:
        m_w = m_w & (o_r < R)[None, :]
    b_w = tl.load(up + o_c[:, None] * s_up + o_r[None, :], mask=m_w, other=0)
    return tl.dot(b_h, tl.trans(b_w.to(b_h.dtype)))


@triton.jit(do_not_specialize=["M", "n_c"])
def bottleneck_adapter_kernel(
    x, y, h, down, down_bias, up, up_bias, norm, norm_bias,
    M,
    n_c,  # blocks of channels: no constant, or the compiler would unroll the loops over them
    s_x, s_y, s_h, s_down, s_up, eps, scale,
    C: tl.constexpr, R: tl.constexpr,
    UNIT: tl.constexpr,  # of strides, so that the compiler sees what divides them
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
    PLACE: tl.constexpr,  # dtype that counts elements from a tile's first row on
    BM: tl.constexpr,
    BR: tl.constexpr, BR2: tl.constexpr,  # R as the sum of two powers of two, or one and 0
    BC: tl.constexpr,
):  # fmt: skip
    s_x, s_y, s_h, s_down, s_up = s_x * UNIT, s_y * UNIT, s_h * UNIT, s_down * UNIT, s_up * UNIT
    i_m = tl.program_id(0).to(tl.int64) * BM
    m_m = tl.arange(0, BM) < M - i_m
    o_m = tl.minimum(tl.arange(0, BM), M - 1 - i_m).to(PLACE)  # the last row again, so that no load needs a mask
    o_r = tl.arange(0, BR)
    p_x = x + i_m * s_x + o_m[:, None] * s_x

    b_mean = tl.zeros([BM], dtype=tl.float32)
    b_inverse = tl.zeros([BM], dtype=tl.float32)
    if norm is not None:
        b_sum = tl.zeros([BM, BC], dtype=tl.float32)
        for i_c in range(n_c):
            o_c = i_c * BC + tl.arange(0, BC)
            b_sum += tl.load(p_x + o_c[None, :], mask=(C % BC == 0) | (o_c < C)[None, :], other=0).to(tl.float32)
        b_mean = tl.sum(b_sum, 1) / C
        b_sum = tl.zeros([BM, BC], dtype=tl.float32)
        for i_c in range(n_c):
            o_c = i_c * BC + tl.arange(0, BC)
            m_c = (C % BC == 0) | (o_c < C)
            b_x = tl.load(p_x + o_c[None, :], mask=m_c[None, :], other=0).to(tl.float32) - b_mean[:, None]
            b_sum += tl.where(m_c[None, :], b_x * b_x, 0.0)
        b_inverse = 1.0 / tl.sqrt(tl.sum(b_sum, 1) / C + eps)

    b_h = tl.zeros([BM, BR], dtype=tl.float32)
    if BR2 > 0:
        o_r2 = BR + tl.arange(0, BR2)
        b_h2 = tl.zeros([BM, BR2], dtype=tl.float32)
    for i_c in range(n_c):
        o_c = i_c * BC + tl.arange(0, BC)
        m_c = (C % BC == 0) | (o_c < C)
        b_x = tl.load(p_x + o_c[None, :], mask=m_c[None, :], other=0)
        if norm is not None:
            b_w = tl.load(norm + o_c, mask=m_c, other=0).to(tl.float32)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_inverse[:, None] * b_w[None, :]
            if norm_bias is not None:
                b_x += tl.load(norm_bias + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
        b_x = b_x.to(DOT)
        b_h += _down(b_x, down, o_r, o_c, s_down, R, BR, 0, m_c)
        if BR2 > 0:
            b_h2 += _down(b_x, down, o_r2, o_c, s_down, R, BR2, BR, m_c)
    b_h = _narrow(b_h, h, down_bias, i_m, o_m, o_r, m_m, s_h, R, ACTIVATION, DOT)
    if BR2 > 0:
        b_h2 = _narrow(b_h2, h, down_bias, i_m, o_m, o_r2, m_m, s_h, R, ACTIVATION, DOT)

    p_y = y + i_m * s_y + o_m[:, None] * s_y
    for i_c in range(n_c):
        o_c = i_c * BC + tl.arange(0, BC)
        m_c = (C % BC == 0) | (o_c < C)
        b_y = _up(b_h, up, o_r, o_c, s_up, R, BR, 0, m_c)
        if BR2 > 0:
            b_y += _up(b_h2, up, o_r2, o_c, s_up, R, BR2, BR, m_c)
        if up_bias is not None:
            b_y += tl.load(up_bias + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
        b_y *= scale
        if RESIDUAL:
            b_y += tl.load(p_x + o_c[None, :], mask=m_c[None, :], other=0).to(tl.float32)
        tl.store(p_y + o_c[None, :], b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


def parts(width: int) -> tuple[int, int]:
    """``(BR, BR2)``: a bottleneck as the sum of two powers of two, or of one and 0, whichever is less."""
    whole = pow2(max(width, 16))
    return (whole // 2, whole // 4) if whole >= 64 and width <= whole // 2 + whole // 4 else (whole, 0)


def plan(
    x: Tensor, out: Tensor, kept: Tensor | None, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor,
    up_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, activation: str, scale: float,
    residual: bool,
) -> Launch:  # fmt: skip
    """The launch over rows ``[M, C]``."""
    (rows, channels), width = x.shape, down_weight.shape[0]
    first, second = parts(width)
    # as many rows as registers hold: weights are read from the second-level cache once for each tile
    tile, block = (128, 64) if first + second <= 128 else (128, 32) if first + second <= 192 else (64, 64)
    strides = {
        "s_x": x.stride(0), "s_y": out.stride(0), "s_h": 0 if kept is None else kept.stride(0),
        "s_down": down_weight.stride(0), "s_up": up_weight.stride(0),
    }  # fmt: skip
    unit = math.gcd(16, *strides.values()) % 16 or 1  # 16 Triton sees itself
    args: dict[str, Any] = {
        "x": x, "y": out, "h": kept, "down": down_weight, "down_bias": down_bias, "up": up_weight, "up_bias": up_bias,
        "norm": norm_weight, "norm_bias": norm_bias, "M": rows, "n_c": cdiv(channels, block),
        **{name: stride // unit for name, stride in strides.items()},
        "eps": eps, "scale": scale,
    }  # fmt: skip
    dot = tl.float32 if dots_in_fp32(x.dtype) else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
    constexprs = {
        "C": channels, "R": width, "UNIT": unit, "ACTIVATION": activation, "RESIDUAL": residual, "DOT": dot,
        "PLACE": tl.int32 if tile * max(strides.values()) < 2**31 else tl.int64,
        "BM": tile, "BR": first, "BR2": second, "BC": block,
    }  # fmt: skip
    return Launch(bottleneck_adapter_kernel, cdiv(rows, tile), args, constexprs, threads=256, stages=3 if tile == 128 else 2)


def forward(x: Tensor, down_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``[..., C]`` -> the same and ``[..., R]``: one kernel in 16 bits while the bottleneck fits into a tile, else PyTorch's
    products.
    """
    nothing = x.numel() == 0 or down_weight.numel() == 0
    if x.itemsize > 2 or down_weight.shape[0] > WIDEST or nothing or not _viewable(x.shape, x.stride()):
        return blocks.forward(x, down_weight, *rest)
    *parameters, eps, activation, scale, residual, keep = rest
    out, kept = blocks.empty_output(x, down_weight, keep)
    run(_plan, (x, down_weight, *parameters, out, kept if keep else None), (eps, activation, scale, residual))
    return out, kept


@lru_cache(1024)
def _viewable(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether x is rows ``[M, C]``."""
    x = torch.empty_strided(shape, stride, device="meta")
    return viewable(x.permute(*memory_order(x), x.dim() - 1))


def _plan(x: Tensor, *rest: Any) -> Launch:
    *parameters, out, kept, eps, activation, scale, residual = rest
    order = (*memory_order(x), x.dim() - 1)
    flat, into, hidden = (None if t is None else t.permute(order).reshape(-1, t.shape[-1]) for t in (x, out, kept))
    return plan(flat, into, hidden, *parameters, eps, activation, scale, residual)  # type: ignore[arg-type, call-arg]


backward = blocks.backward


def _aot(name: str, channels: int, width: int, activation: str, normed: bool) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, norm = empty(64 * 8 * 197, channels), empty(channels) if normed else None
        down, down_bias, up, up_bias = empty(width, channels), empty(width), empty(channels, width), empty(channels)
        return plan(x, x, empty(len(x), width), down, down_bias, up, up_bias, norm, norm, 1e-5, activation, 0.5, True)

    return Entry(f"bottleneck_adapter {name}", launch, (torch.float16, torch.bfloat16), dots=True)


AOT = [
    _aot("C768 R64 relu, norm", 768, 64, "relu", normed=True),
    _aot("C768 R192 gelu", 768, 192, "gelu", normed=False),
    _aot("C1024 R256 quick_gelu", 1024, 256, "quick_gelu", normed=False),
    _aot("C768 R128 silu, norm", 768, 128, "silu", normed=True),
    _aot("C760 R192 gelu", 760, 192, "gelu", normed=False),
]
