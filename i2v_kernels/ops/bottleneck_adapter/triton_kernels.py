"""Triton kernel of ``bottleneck_adapter`` and its launcher. How it works and why: README.md beside this file."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import memory_order
from ..products import viewable
from ..triton_activations import activate
from ..triton_common import Entry, Launch, cdiv, dots_in_fp32, pow2
from ..triton_launch import run
from . import blocks

WIDEST = 256  # bottleneck of a tile


@triton.jit
def bottleneck_adapter_kernel(
    x, y, h, down, down_bias, up, up_bias, norm, norm_bias,
    M, C, R, s_x, s_y, s_h, s_down, s_up, eps, scale,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_r = tl.arange(0, BR)
    m_m, m_r = o_m < M, o_r < R
    n_c = tl.cdiv(C, BC)
    p_x = x + o_m[:, None] * s_x

    b_mean = tl.zeros([BM], dtype=tl.float32)
    b_inverse = tl.zeros([BM], dtype=tl.float32)
    if norm is not None:
        for i_c in range(n_c):
            o_c = i_c * BC + tl.arange(0, BC)
            b_x = tl.load(p_x + o_c[None, :], mask=m_m[:, None] & (o_c < C)[None, :], other=0).to(tl.float32)
            b_mean += tl.sum(b_x, 1)
        b_mean = b_mean / C
        b_scatter = tl.zeros([BM], dtype=tl.float32)
        for i_c in range(n_c):
            o_c = i_c * BC + tl.arange(0, BC)
            b_x = tl.load(p_x + o_c[None, :], mask=m_m[:, None] & (o_c < C)[None, :], other=0).to(tl.float32)
            b_x = tl.where((o_c < C)[None, :], b_x - b_mean[:, None], 0.0)
            b_scatter += tl.sum(b_x * b_x, 1)
        b_inverse = 1.0 / tl.sqrt(b_scatter / C + eps)

    b_h = tl.zeros([BM, BR], dtype=tl.float32)
    for i_c in range(n_c):
        o_c = i_c * BC + tl.arange(0, BC)
        b_x = tl.load(p_x + o_c[None, :], mask=m_m[:, None] & (o_c < C)[None, :], other=0)
        if norm is not None:
            b_w = tl.load(norm + o_c, mask=o_c < C, other=0).to(tl.float32)
            b_x = (b_x.to(tl.float32) - b_mean[:, None]) * b_inverse[:, None] * b_w[None, :]
            if norm_bias is not None:
                b_x += tl.load(norm_bias + o_c, mask=o_c < C, other=0).to(tl.float32)[None, :]
        b_w = tl.load(down + o_r[:, None] * s_down + o_c[None, :], mask=m_r[:, None] & (o_c < C)[None, :], other=0)
        b_h += tl.dot(b_x.to(DOT), tl.trans(b_w.to(DOT)))
    if down_bias is not None:
        b_h += tl.load(down_bias + o_r, mask=m_r, other=0).to(tl.float32)[None, :]
    if h is not None:
        tl.store(h + o_m[:, None] * s_h + o_r[None, :], b_h.to(h.dtype.element_ty), mask=m_m[:, None] & m_r[None, :])
    b_h = activate(b_h, ACTIVATION).to(DOT)

    p_y = y + o_m[:, None] * s_y
    for i_c in range(n_c):
        o_c = i_c * BC + tl.arange(0, BC)
        m_y = m_m[:, None] & (o_c < C)[None, :]
        b_w = tl.load(up + o_c[:, None] * s_up + o_r[None, :], mask=(o_c < C)[:, None] & m_r[None, :], other=0)
        b_y = tl.dot(b_h, tl.trans(b_w.to(DOT)))
        if up_bias is not None:
            b_y += tl.load(up_bias + o_c, mask=o_c < C, other=0).to(tl.float32)[None, :]
        b_y *= scale
        if RESIDUAL:
            b_y += tl.load(p_x + o_c[None, :], mask=m_y, other=0).to(tl.float32)
        tl.store(p_y + o_c[None, :], b_y.to(y.dtype.element_ty), mask=m_y)


def plan(
    x: Tensor, out: Tensor, kept: Tensor | None, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor,
    up_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, activation: str, scale: float,
    residual: bool,
) -> Launch:  # fmt: skip
    """The launch over rows ``[M, C]``."""
    (rows, channels), width = x.shape, pow2(max(down_weight.shape[0], 16))
    tile = 64 if width > 128 else 128
    args = {
        "x": x, "y": out, "h": kept, "down": down_weight, "down_bias": down_bias, "up": up_weight, "up_bias": up_bias,
        "norm": norm_weight, "norm_bias": norm_bias, "M": rows, "C": channels, "R": down_weight.shape[0],
        "s_x": x.stride(0), "s_y": out.stride(0), "s_h": 0 if kept is None else kept.stride(0),
        "s_down": down_weight.stride(0), "s_up": up_weight.stride(0),
        "eps": eps, "scale": scale,
    }  # fmt: skip
    dot = tl.float32 if dots_in_fp32(x.dtype) else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
    constexprs = {
        "ACTIVATION": activation, "RESIDUAL": residual, "DOT": dot, "BM": tile, "BR": width, "BC": 64 if width > 64 else 128,
    }  # fmt: skip
    return Launch(bottleneck_adapter_kernel, cdiv(rows, tile), args, constexprs, threads=256, stages=2)


def forward(x: Tensor, down_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``[..., C]`` -> the same and ``[..., R]``: one kernel in 16 bits while the bottleneck fits into a tile, else PyTorch's
    products.
    """
    if x.itemsize > 2 or down_weight.shape[0] > WIDEST or x.numel() == 0 or not _viewable(x.shape, x.stride()):
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
]
