"""Triton kernels of ``temporal_conv`` and of the gradient of its input. How they work and why: README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import empty_dense_like
from ..triton_activations import activate, activation_gradient
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run
from .gradients import gradients
from .triton_tiles import strides, tile
from .triton_weight_grad import plan_weight_grad

UNROLLED = 7  # taps that are unrolled; more of them are a loop
ROWS = 2  # rolling kernel: rows of a tile that share the weights in a thread's registers


@triton.jit
def temporal_conv_kernel(
    x, weight, bias, extra, y,
    T, N, C,
    height, width, prefix, dilation,
    s_xb, s_xt, s_xn,
    s_eb, s_et, s_en,
    s_yb, s_yt, s_yn,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    FLIP: tl.constexpr,  # the kernel turned round: the gradient of the input
    COPY: tl.constexpr,  # prefix tokens are copied, else zero
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,  # extra is the gradient behind the activation, else it is added
    UNROLL: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    n_t = tl.cdiv(T, BT)
    n_n = tl.cdiv(N, BN)
    i_c = i_p % n_c
    i_t = i_p // n_c % n_t
    i_n = i_p // n_c // n_t % n_n
    i_b = (i_p // n_c // n_t // n_n).to(tl.int64)
    o_t = (i_t * BT + tl.arange(0, BT))[:, None, None]
    o_n = (i_n * BN + tl.arange(0, BN))[None, :, None]
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_n = (o_n < N) & m_c[None, None, :]
    m_p = m_n & (o_n >= prefix)
    o_h = (o_n - prefix) // width
    o_w = (o_n - prefix) % width
    p_x = x + i_b * s_xb + o_n.to(tl.int64) * s_xn + o_c[None, None, :]  # [1, BN, BC]
    # a weight is loaded once for all frames of the tile but by every row, so that it arrives in the tile's layout
    p_w = (weight + o_c)[None, None, :] + tl.zeros([1, BN, 1], dtype=tl.int32)

    b_y = tl.zeros([BT, BN, BC], dtype=tl.float32)
    if bias is not None:
        p_b = (bias + o_c)[None, None, :] + tl.zeros([1, BN, 1], dtype=tl.int32)
        b_y += tl.load(p_b, mask=m_n, other=0).to(tl.float32)
    if UNROLL:
        for k in tl.static_range(KT * KH * KW):
            b_y = _tap(b_y, p_x, p_w, k, o_t, o_h, o_w, m_n, m_p, T, C, height, width, dilation, s_xt, s_xn, KT, KH, KW, FLIP)
    else:
        for k in range(KT * KH * KW):
            b_y = _tap(b_y, p_x, p_w, k, o_t, o_h, o_w, m_n, m_p, T, C, height, width, dilation, s_xt, s_xn, KT, KH, KW, FLIP)
    m_y = (o_t < T) & m_n
    m_k = o_n >= (prefix if COPY else 0)
    p_y = y + i_b * s_yb + o_t.to(tl.int64) * s_yt + o_n.to(tl.int64) * s_yn + o_c[None, None, :]
    p_e = p_x + o_t.to(tl.int64) * s_xt
    if extra is not None:
        p_e = extra + i_b * s_eb + o_t.to(tl.int64) * s_et + o_n.to(tl.int64) * s_en + o_c[None, None, :]
    b_y = _finish(b_y, extra, p_e, m_y & m_k, ACTIVATION, GRADIENT)
    tl.store(p_y, tl.where(o_n >= prefix, b_y, 0.0).to(y.dtype.element_ty), mask=m_y & m_k)
    if COPY:  # noqa: SIM102  (known when compiled, the next is not)
        if i_n * BN < prefix:
            m_q = m_y & (o_n < prefix)
            tl.store(p_y, tl.load(p_e, mask=m_q), mask=m_q)  # what extra holds there x does too, but for a gradient


@triton.jit
def _finish(b_y, extra, p_e, m_e, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr):
    """From sums to output."""
    if extra is None:
        return activate(b_y, ACTIVATION)
    b_e = tl.load(p_e, mask=m_e, other=0).to(tl.float32)
    if GRADIENT:
        return activation_gradient(b_e, b_y, ACTIVATION)
    return activate(b_y, ACTIVATION) + b_e


@triton.jit
def _tap(
    b_y, p_x, p_w, k, o_t, o_h, o_w, m_n, m_p, T, C, height, width, dilation, s_xt, s_xn, KT: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    i_h = k // KW % KH - KH // 2
    i_w = k % KW - KW // 2
    o_s = o_t + (k // (KH * KW) - KT // 2) * dilation
    m_x = m_p & (o_s >= 0) & (o_s < T)
    if KH * KW > 1:
        m_x = m_x & (o_h + i_h >= 0) & (o_h + i_h < height) & (o_w + i_w >= 0) & (o_w + i_w < width)
        p_x += (i_h * width + i_w) * tl.cast(s_xn, tl.int64)
    b_x = tl.load(p_x + o_s.to(tl.int64) * s_xt, mask=m_x, other=0)  # [BT, BN, BC]
    i_k = KT * KH * KW - 1 - k if FLIP else k
    b_w = tl.load(p_w + i_k * C, mask=m_n, other=0)  # [1, BN, BC]
    return b_y + b_x.to(tl.float32) * b_w.to(tl.float32)


@triton.jit
def temporal_conv_rolling_kernel(
    x, weight, bias, extra, y,
    T, N, C,
    height, width, prefix,
    s_xb, s_xt, s_xn,
    s_eb, s_et, s_en,
    s_yb, s_yt, s_yn,
    KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr, COPY: tl.constexpr, ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """kt = 3 over a grid: a frame is read once and added to the three frames that it reaches."""
    i_p = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    n_t = tl.cdiv(T, BT)
    n_n = tl.cdiv(N, BR * BN)
    i_c = i_p % n_c
    i_t = i_p // n_c % n_t
    i_n = i_p // n_c // n_t % n_n
    i_b = (i_p // n_c // n_t // n_n).to(tl.int64)
    o_n = i_n * BR * BN + tl.arange(0, BR)[:, None, None] * BN + tl.arange(0, BN)[None, :, None]
    o_c = (i_c * BC + tl.arange(0, BC))[None, None, :]
    m_n = (o_n < N) & (o_c < C)  # [BR, BN, BC]
    m_p = o_n >= prefix
    o_h = (o_n - prefix) // width
    o_w = (o_n - prefix) % width
    i_0 = i_t * BT - 1  # the first frame that reaches this tile
    p_x = x + i_b * s_xb + i_0.to(tl.int64) * s_xt + o_n.to(tl.int64) * s_xn + o_c
    p_y = y + i_b * s_yb + (i_0 - 1).to(tl.int64) * s_yt + o_n.to(tl.int64) * s_yn + o_c
    p_e = p_x - s_xt
    if extra is not None:
        p_e = extra + i_b * s_eb + (i_0 - 1).to(tl.int64) * s_et + o_n.to(tl.int64) * s_en + o_c
    p_w = weight + o_c + tl.zeros([1, BN, 1], dtype=tl.int32)  # every row loads it: it arrives in the tile's layout
    m_w = (o_c < C) & (tl.arange(0, BN) < N)[None, :, None]
    S: tl.constexpr = KH * KW

    b_bias = tl.zeros([BR, BN, BC], dtype=tl.float32)
    if bias is not None:
        b_bias += tl.load(bias + o_c + tl.zeros([1, BN, 1], dtype=tl.int32), mask=m_w, other=0).to(tl.float32)
    b_y0 = b_bias  # [BR, BN, BC] the sums of the frames before, at and behind the one that is read
    b_y1 = b_bias
    for i in range(BT + 2):
        b_y2 = b_bias
        m_t = (i_0 + i >= 0) & (i_0 + i < T)
        for r in range(KH):  # a loop: unrolled, its loads would not fit in registers
            m_r = m_n & m_p & m_t & (o_h + (r - KH // 2) >= 0) & (o_h + (r - KH // 2) < height)
            for c in tl.static_range(KW):
                i_w = c - KW // 2
                p_k = p_x + ((r - KH // 2) * width + i_w) * tl.cast(s_xn, tl.int64)
                b_x = tl.load(p_k, mask=m_r & (o_w + i_w >= 0) & (o_w + i_w < width), other=0).to(tl.float32)
                k = S - 1 - r * KW - c if FLIP else r * KW + c
                b_wa = tl.load(p_w + k * C, mask=m_w, other=0).to(tl.float32)  # [1, BN, BC]
                b_wb = tl.load(p_w + (k + S) * C, mask=m_w, other=0).to(tl.float32)
                b_wc = tl.load(p_w + (k + 2 * S) * C, mask=m_w, other=0).to(tl.float32)
                b_y0 += (b_wa if FLIP else b_wc) * b_x
                b_y1 += b_wb * b_x
                b_y2 += (b_wc if FLIP else b_wa) * b_x
        m_y = m_n & (i >= 2) & (i_0 + i <= T)
        m_k = o_n >= (prefix if COPY else 0)
        b_y0 = _finish(b_y0, extra, p_e, m_y & m_k, ACTIVATION, GRADIENT)
        tl.store(p_y, tl.where(m_p, b_y0, 0.0).to(y.dtype.element_ty), mask=m_y & m_k)
        if COPY:  # noqa: SIM102
            if i_n * BR * BN < prefix:
                m_q = m_y & (o_n < prefix)
                tl.store(p_y, tl.load(p_e, mask=m_q), mask=m_q)
        b_y0 = b_y1
        b_y1 = b_y2
        p_x += s_xt
        p_y += s_yt
        p_e += s_xt if extra is None else s_et


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    height: int,
    width: int,
    prefix: int,
    prefix_mode: str,
    dilation: int,
    activation: str = "",
    extra: Tensor | None = None,
    gradient: bool = False,
    turned: bool = False,
) -> Launch:
    """The launch that writes y from x: ``activation`` of the convolution plus ``extra``, or with ``gradient``: extra being
    the gradient behind the activation, that before it. ``turned`` turns the kernel round."""
    batch, frames, tokens, channels = x.shape
    kt, kh, kw = weight.shape[2:]
    weight = weight.reshape(channels, -1).t().contiguous()  # [taps, C]: channels innermost, as in x
    args: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "extra": extra, "y": y, "T": frames, "N": tokens}
    args |= {"C": channels, "height": height, "width": max(width, 1), "prefix": prefix}
    args |= strides(x=x, e=x if extra is None else extra, y=y)
    rolling = kt == 3 and kh * kw > 1 and dilation == 1
    copy = prefix_mode == "copy" and prefix > 0
    constexprs: dict[str, Any] = {"KH": kh, "KW": kw, "FLIP": turned, "COPY": copy, "ACTIVATION": activation}
    constexprs["GRADIENT"] = gradient
    bn, bc = tile(tokens, channels, 1, x.element_size())
    br = 1
    if rolling:
        bt = min(pow2(frames), 8)
        br = ROWS if tokens > bn else 1
        constexprs["BR"] = br
    else:
        args["dilation"] = dilation
        unroll = kt * kh * kw <= UNROLLED
        bt = min(pow2(frames), 4 if unroll and kt * kh * kw > 3 else 8)  # the loads of unrolled taps wait in registers
        constexprs |= {"KT": kt, "UNROLL": unroll}
    constexprs |= {"BT": bt, "BN": bn, "BC": bc}
    programs = batch * cdiv(frames, bt) * cdiv(tokens, br * bn) * cdiv(channels, bc)
    return Launch(temporal_conv_rolling_kernel if rolling else temporal_conv_kernel, programs, args, constexprs)


def _convolve(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Tensor | None, height: int, width: int, prefix: int,
    prefix_mode: str, dilation: int, activation: str = "", gradient: bool = False, turned: bool = False,
) -> Tensor:  # fmt: skip
    if out.numel() > 0:
        taps = weight.flatten(1).t().contiguous()  # [taps, C]: channels innermost, as in x
        options = (weight.shape[1:], height, width, prefix, prefix_mode, dilation, activation, gradient, turned)
        run(_plan, (x, taps, bias, extra, out), options)
    return out


def _plan(x: Tensor, taps: Tensor, bias: Any, extra: Any, out: Tensor, kernel: Any, *options: Any) -> Launch:
    *most, gradient, turned = options
    return plan(x, taps.t().unflatten(1, kernel), bias, out, *most, extra, gradient, turned)  # type: ignore[call-arg]


def _sum_products(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, prefix: int, dilation: int
) -> tuple[Tensor, Tensor]:
    options = (height, width, prefix, dilation)
    if x.numel() == 0:
        _, weight_sums, bias_sums = plan_weight_grad(grad, x, weight, *options)
        return weight_sums.zero_(), bias_sums.zero_()
    weight_sums, bias_sums = run(plan_weight_grad, (grad, x, weight), options)  # type: ignore[assignment]
    return weight_sums, bias_sums


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """``[B, T, N, C]``, ``[C, 1, kt, kh, kw]``, ``[C]`` -> ``[B, T, N, C]``."""
    *options, residual = rest
    return _convolve(empty_dense_like(x), x, weight, bias, x if residual else None, *options)


backward = partial(gradients, _convolve, _sum_products)


def _meta(dtype: torch.dtype, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(8, 8, 197, 384, dtype=dtype, device="meta")  # ST-Adapter on ViT-B/16
    return x, torch.empty(384, 1, *kernel, dtype=dtype, device="meta"), torch.empty(384, dtype=dtype, device="meta")


def _forward_entry(*kernel: int, what: str = "", dilation: int = 1, residual: bool = False, **more: Any) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, bias = _meta(dtype, kernel)
        extra = x if residual or more.get("gradient") else None
        return plan(x, weight, bias, torch.empty_like(x), 14, 14, 1, "copy", dilation, extra=extra, **more)

    return Entry(f"temporal_conv {kernel}{what}", launch)


def _input_grad_entry(*kernel: int) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, _ = _meta(dtype, kernel)
        return plan(x, weight, None, torch.empty_like(x), 14, 14, 1, "zero", 1, turned=True)

    return Entry(f"temporal_conv input gradient {kernel}", launch)


def _weight_grad_entry(*kernel: int, dilation: int = 1) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, _ = _meta(dtype, kernel)
        return plan_weight_grad(torch.empty_like(x), x, weight, 14, 14, 1, dilation)[0]

    return Entry(f"temporal_conv weight gradient {kernel}{f' dilation {dilation}' if dilation > 1 else ''}", launch)


def _ones(dtype: torch.dtype, *kernel: int) -> Launch:
    x = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    weight = torch.empty(1, 1, *(kernel or (3, 1, 1)), dtype=dtype, device="meta")
    if not kernel:
        return plan_weight_grad(x, x, weight, 1, 1, 0, 1)[0]
    return plan(x, weight, x[0, 0, 0], x, 1, 1, 0, "zero", 1)


AOT = [
    _forward_entry(3, 1, 1),
    _forward_entry(5, 1, 1),
    _forward_entry(1, 3, 3),
    _forward_entry(3, 3, 3),
    _forward_entry(5, 5, 5),
    _forward_entry(3, 1, 1, what=" residual", residual=True),
    _forward_entry(3, 1, 1, what=" gelu", activation="gelu"),
    _forward_entry(3, 1, 1, what=" gelu gradient", activation="gelu", gradient=True),
    _forward_entry(3, 1, 1, what=" dilation 2", dilation=2),
    _forward_entry(3, 3, 3, what=" quick_gelu residual", activation="quick_gelu", residual=True),
    _forward_entry(3, 3, 3, what=" quick_gelu gradient", activation="quick_gelu", gradient=True),
    _input_grad_entry(3, 1, 1),
    _input_grad_entry(3, 3, 3),
    _weight_grad_entry(3, 1, 1),
    _weight_grad_entry(3, 3, 3),
    _weight_grad_entry(3, 1, 1, dilation=2),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("temporal_conv (3, 1, 1), all sizes 1", lambda dtype: _ones(dtype, 3, 1, 1), (torch.bfloat16,), vectors=False),
    Entry("temporal_conv (3, 3, 3), all sizes 1", lambda dtype: _ones(dtype, 3, 3, 3), (torch.bfloat16,), vectors=False),
    Entry("temporal_conv weight gradient, all sizes 1", _ones, (torch.bfloat16,), vectors=False),
]
