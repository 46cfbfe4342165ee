"""Triton kernels of ``temporal_conv`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import empty_dense_like
from ..triton_common import Entry, Launch, cdiv, pow2, run

WIDEST = 256  # channels of a tile
UNROLLED = 7  # taps that are unrolled; more of them are a loop
ROWS = 2  # rolling kernel: rows of a tile that share the weights in a thread's registers
PARTIALS = 512  # programs that share the sums of the weight gradient


@triton.jit
def temporal_conv_kernel(
    x, weight, bias, y,
    T, N, C,
    height, width, prefix,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    FLIP: tl.constexpr,  # the kernel turned round: the gradient of the input
    COPY: tl.constexpr,  # prefix tokens are copied, else zero
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
            b_y = _tap(b_y, p_x, p_w, k, o_t, o_h, o_w, m_n, m_p, T, C, height, width, s_xt, s_xn, KT, KH, KW, FLIP)
    else:
        for k in range(KT * KH * KW):
            b_y = _tap(b_y, p_x, p_w, k, o_t, o_h, o_w, m_n, m_p, T, C, height, width, s_xt, s_xn, KT, KH, KW, FLIP)
    m_y = (o_t < T) & m_n
    m_k = o_n >= (prefix if COPY else 0)
    p_y = y + i_b * s_yb + o_t.to(tl.int64) * s_yt + o_n.to(tl.int64) * s_yn + o_c[None, None, :]
    tl.store(p_y, tl.where(o_n >= prefix, b_y, 0.0).to(y.dtype.element_ty), mask=m_y & m_k)
    if COPY:  # noqa: SIM102  (known when compiled, the next is not)
        if i_n * BN < prefix:
            m_q = m_y & (o_n < prefix)
            tl.store(p_y, tl.load(p_x + o_t.to(tl.int64) * s_xt, mask=m_q), mask=m_q)


@triton.jit
def _tap(
    b_y, p_x, p_w, k, o_t, o_h, o_w, m_n, m_p, T, C, height, width, s_xt, s_xn, KT: tl.constexpr, KH: tl.constexpr,
    KW: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    i_h = k // KW % KH - KH // 2
    i_w = k % KW - KW // 2
    o_s = o_t + (k // (KH * KW) - KT // 2)
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
    x, weight, bias, y,
    T, N, C,
    height, width, prefix,
    s_xb, s_xt, s_xn,
    s_yb, s_yt, s_yn,
    KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr, COPY: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr,
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
        tl.store(p_y, tl.where(m_p, b_y0, 0.0).to(y.dtype.element_ty), mask=m_y & m_k)
        if COPY:  # noqa: SIM102
            if i_n * BR * BN < prefix:
                m_q = m_y & (o_n < prefix)
                tl.store(p_y, tl.load(p_x - s_xt, mask=m_q), mask=m_q)
        b_y0 = b_y1
        b_y1 = b_y2
        p_x += s_xt
        p_y += s_yt


@triton.jit
def temporal_conv_weight_grad_kernel(
    grad, x,
    weight_sums,  # [P, taps, C] fp32
    bias_sums,  # [P, C] fp32
    B,
    T, N, C,
    height, width, prefix,
    s_gb, s_gt, s_gn,
    s_xb, s_xt, s_xn, P,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over every P-th tile of tokens, all frames, for three neighbouring taps in time and one in the grid."""
    i_q = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    S: tl.constexpr = KH * KW
    n_k: tl.constexpr = (KT + 2) // 3 * S
    n_n = tl.cdiv(N, BN)
    i_k = i_q % n_k
    i_c = i_q // n_k % n_c
    i_p = i_q // n_k // n_c
    i_t = i_k // S * 3  # the first of the three taps in time
    i_h = i_k % S // KW - KH // 2
    i_w = i_k % KW - KW // 2
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = (o_c < C)[None, :]
    i_d = i_t - KT // 2  # frames from a gradient to the first tap's input

    b_0 = tl.zeros([BN, BC], dtype=tl.float32)
    b_1 = tl.zeros([BN, BC], dtype=tl.float32)
    b_2 = tl.zeros([BN, BC], dtype=tl.float32)
    b_b = tl.zeros([BN, BC], dtype=tl.float32)
    for i_u in range(i_p, B * n_n, P):
        o_n = i_u % n_n * BN + tl.arange(0, BN)
        i_b = tl.cast(i_u // n_n, tl.int64)
        o_h = (o_n - prefix) // width + i_h
        o_w = (o_n - prefix) % width + i_w
        m_g = ((o_n >= prefix) & (o_n < N))[:, None] & m_c
        m_x = m_g & ((o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width))[:, None]
        o_x = (o_n + i_h * width + i_w).to(tl.int64)
        p_g = grad + i_b * s_gb + o_n.to(tl.int64)[:, None] * s_gn + o_c[None, :]
        p_x = x + i_b * s_xb + i_d.to(tl.int64) * s_xt + o_x[:, None] * s_xn + o_c[None, :]
        b_x0 = tl.load(p_x, mask=m_x & (i_d >= 0) & (i_d < T), other=0).to(tl.float32)  # [BN, BC]
        p_x += s_xt
        b_x1 = tl.load(p_x, mask=m_x & (i_d + 1 >= 0) & (i_d + 1 < T), other=0).to(tl.float32)
        for i in range(T):
            p_x += s_xt
            b_x2 = tl.load(p_x, mask=m_x & (i_d + i + 2 >= 0) & (i_d + i + 2 < T), other=0).to(tl.float32)
            b_g = tl.load(p_g, mask=m_g, other=0).to(tl.float32)
            b_0 += b_g * b_x0
            b_1 += b_g * b_x1
            b_2 += b_g * b_x2
            b_b += b_g
            b_x0 = b_x1
            b_x1 = b_x2
            p_g += s_gt

    p_s = weight_sums + (i_p.to(tl.int64) * (KT * S) + i_t * S + i_k % S) * C + o_c
    m_c = o_c < C
    tl.store(p_s, tl.sum(b_0, 0), mask=m_c)
    tl.store(p_s + S * C, tl.sum(b_1, 0), mask=m_c & (i_t + 1 < KT))
    tl.store(p_s + 2 * S * C, tl.sum(b_2, 0), mask=m_c & (i_t + 2 < KT))
    tl.store(bias_sums + i_p.to(tl.int64) * C + o_c, tl.sum(b_b, 0), mask=m_c & (i_k == 0))


def tile(tokens: int, channels: int, vectors: int, itemsize: int) -> tuple[int, int]:
    """``(BN, BC)``: tokens and channels, so that each of 128 threads holds this many 16-byte vectors of a frame."""
    width = min(pow2(channels), WIDEST)
    return min(max(128 * vectors * (16 // itemsize) // width, 1), pow2(tokens)), width


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {f"s_{name}{axis}": stride for name, t in tensors.items() for axis, stride in zip("btn", t.stride())}


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    height: int,
    width: int,
    prefix: int,
    prefix_mode: str,
    flip: bool = False,
) -> Launch:
    """The launch that writes y from x."""
    batch, frames, tokens, channels = x.shape
    kt, kh, kw = weight.shape[2:]
    weight = weight.reshape(channels, -1).t().contiguous()  # [taps, C]: channels innermost, as in x
    args: dict[str, Any] = {"x": x, "weight": weight, "bias": bias, "y": y, "T": frames, "N": tokens, "C": channels}
    args |= {"height": height, "width": max(width, 1), "prefix": prefix, **_strides(x=x, y=y)}
    rolling = kt == 3 and kh * kw > 1
    copy = prefix_mode == "copy" and prefix > 0
    constexprs: dict[str, Any] = {"KH": kh, "KW": kw, "FLIP": flip, "COPY": copy}
    bn, bc = tile(tokens, channels, 1, x.element_size())
    br = 1
    if rolling:
        bt = min(pow2(frames), 8)
        br = ROWS if tokens > bn else 1
        constexprs["BR"] = br
    else:
        unroll = kt * kh * kw <= UNROLLED
        bt = min(pow2(frames), 4 if unroll and kt * kh * kw > 3 else 8)  # the loads of unrolled taps wait in registers
        constexprs |= {"KT": kt, "UNROLL": unroll}
    constexprs |= {"BT": bt, "BN": bn, "BC": bc}
    programs = batch * cdiv(frames, bt) * cdiv(tokens, br * bn) * cdiv(channels, bc)
    return Launch(temporal_conv_rolling_kernel if rolling else temporal_conv_kernel, programs, args, constexprs)


def plan_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, prefix: int
) -> tuple[Launch, Tensor, Tensor]:
    """The launch, and the partial sums that it writes: ``[P, taps, C]`` of the weight, ``[P, C]`` of the bias."""
    batch, frames, tokens, channels = x.shape
    kt, kh, kw = weight.shape[2:]
    bn, bc = tile(tokens, channels, 2, x.element_size())
    shares = cdiv(channels, bc) * cdiv(kt, 3) * kh * kw
    partials = max(1, min(PARTIALS // shares, batch * cdiv(tokens, bn)))
    weight_sums = torch.empty(partials, kt * kh * kw, channels, dtype=torch.float32, device=x.device)
    bias_sums = torch.empty(partials, channels, dtype=torch.float32, device=x.device)
    args: dict[str, Any] = {"grad": grad, "x": x, "weight_sums": weight_sums, "bias_sums": bias_sums}
    args |= {"B": batch, "T": frames, "N": tokens, "C": channels, "height": height, "width": max(width, 1)}
    args |= {"prefix": prefix, "P": partials, **_strides(g=grad, x=x)}
    constexprs = {"KT": kt, "KH": kh, "KW": kw, "BN": bn, "BC": bc}
    return Launch(temporal_conv_weight_grad_kernel, partials * shares, args, constexprs), weight_sums, bias_sums


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, prefix: int, prefix_mode: str
) -> Tensor:
    """``[B, T, N, C]``, ``[C, 1, kt, kh, kw]``, ``[C]`` -> ``[B, T, N, C]``."""
    out = empty_dense_like(x)
    if out.numel() > 0:
        run([plan(x, weight, bias, out, height, width, prefix, prefix_mode)], x.device)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
    prefix: int,
    prefix_mode: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; an empty tensor for one that is not wanted."""
    dx = dweight = dbias = torch.empty(0, dtype=grad.dtype, device=grad.device)
    if wanted[0]:
        dx = empty_dense_like(x)
        if dx.numel() > 0:
            run([plan(grad, weight, None, dx, height, width, prefix, prefix_mode, flip=True)], x.device)
    if wanted[1] or wanted[2]:
        launch, weight_sums, bias_sums = plan_weight_grad(grad, x, weight, height, width, prefix)
        if x.numel() > 0:
            run([launch], x.device)
        else:
            weight_sums.zero_()
            bias_sums.zero_()
        if wanted[1]:
            dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            dweight.copy_(weight_sums.sum(0).t().reshape(weight.shape))
        if wanted[2]:
            dbias = bias_sums.sum(0).to(weight.dtype)
    return dx, dweight, dbias


def _meta(dtype: torch.dtype, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(8, 8, 197, 384, dtype=dtype, device="meta")  # ST-Adapter on ViT-B/16
    return x, torch.empty(384, 1, *kernel, dtype=dtype, device="meta"), torch.empty(384, dtype=dtype, device="meta")


def _forward_entry(*kernel: int) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, bias = _meta(dtype, kernel)
        return plan(x, weight, bias, torch.empty_like(x), 14, 14, 1, "copy")

    return Entry(f"temporal_conv {kernel}", launch)


def _input_grad_entry(*kernel: int) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, _ = _meta(dtype, kernel)
        return plan(x, weight, None, torch.empty_like(x), 14, 14, 1, "zero", flip=True)

    return Entry(f"temporal_conv input gradient {kernel}", launch)


def _weight_grad_entry(*kernel: int) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, _ = _meta(dtype, kernel)
        return plan_weight_grad(torch.empty_like(x), x, weight, 14, 14, 1)[0]

    return Entry(f"temporal_conv weight gradient {kernel}", launch)


def _ones(dtype: torch.dtype, *kernel: int) -> Launch:
    x = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    weight = torch.empty(1, 1, *(kernel or (3, 1, 1)), dtype=dtype, device="meta")
    if not kernel:
        return plan_weight_grad(x, x, weight, 1, 1, 0)[0]
    return plan(x, weight, x[0, 0, 0], x, 1, 1, 0, "zero")


AOT = [
    _forward_entry(3, 1, 1),
    _forward_entry(5, 1, 1),
    _forward_entry(1, 3, 3),
    _forward_entry(3, 3, 3),
    _forward_entry(5, 5, 5),
    _input_grad_entry(3, 1, 1),
    _input_grad_entry(3, 3, 3),
    _weight_grad_entry(3, 1, 1),
    _weight_grad_entry(3, 3, 3),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("temporal_conv (3, 1, 1), all sizes 1", lambda dtype: _ones(dtype, 3, 1, 1), (torch.bfloat16,), vectors=False),
    Entry("temporal_conv (3, 3, 3), all sizes 1", lambda dtype: _ones(dtype, 3, 3, 3), (torch.bfloat16,), vectors=False),
    Entry("temporal_conv weight gradient, all sizes 1", _ones, (torch.bfloat16,), vectors=False),
]
