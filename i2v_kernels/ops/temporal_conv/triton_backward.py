"""Triton kernels of ``temporal_conv``'s backward but for the gradient of the input alone: README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import Launch, cdiv, pow2
from .triton_tiles import LONGEST, push, put, strides, tile, widen

WAVE = 396  # programs: three for each of 132 multiprocessors. A constant, so that the sums' order is the shape's alone
TOGETHER = 5  # taps in time up to which dx is written too: seven would take too many registers
LOADS = 8  # 16-byte loads of a thread that are under way together


@triton.jit(do_not_specialize=["B", "P"])
def temporal_conv_backward_kernel(
    grad, x,
    weight,  # [taps, C] fp32, for dx
    dx,  # of a kernel over time alone; or None
    sums,  # [P, taps + 1, C] fp32: of the weight and, last, of the bias
    B,
    T, N, C,
    height, width, prefix, dilation,
    s_gb, s_gt, s_gn,
    s_xb, s_xt, s_xn,
    s_db, s_dt, s_dn, P,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    GT: tl.constexpr, GH: tl.constexpr, GW: tl.constexpr,  # the taps of one program
    RESIDUAL: tl.constexpr,  # dx is the gradient of x + convolution
    COPY: tl.constexpr,  # so is that of prefix tokens, else zero
    WHOLE: tl.constexpr,  # C is a multiple of BC
    BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums over every P-th tile of tokens, all frames, for a few neighbouring taps; and, tile by tile, dx."""
    i_q = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    n_h: tl.constexpr = (KH + GH - 1) // GH
    n_w: tl.constexpr = (KW + GW - 1) // GW
    n_g: tl.constexpr = (KT + GT - 1) // GT * n_h * n_w
    S: tl.constexpr = GH * GW
    CENTRE: tl.constexpr = KT // 2 % GT  # the middle tap, in the program that holds it
    n_n = tl.cdiv(N, BN)
    i_g = i_q % n_g
    i_c = i_q // n_g % n_c
    i_p = i_q // n_g // n_c
    i_t = i_g // (n_h * n_w) * GT  # this program's first tap
    i_h = i_g // n_w % n_h * GH
    i_w = i_g % n_w * GW
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = ((o_c < C) | WHOLE)[None, :]

    b_k = ()
    if dx is not None:
        p_k = weight + o_c[None, :] + tl.zeros([BN, 1], dtype=tl.int32)  # every row loads it: it arrives in the tile's layout
        for k in tl.static_range(KT):
            b_k = push(b_k, tl.load(p_k + k * C, mask=m_c, other=0))
    b_s = ()  # GT * S sums [BN, BC]
    for _ in tl.static_range(GT * S):
        b_s = push(b_s, tl.zeros([BN, BC], dtype=tl.float32))
    b_b = tl.zeros([BN, BC], dtype=tl.float32)
    for i_u in range(i_p, B * n_n, P):
        i_b = tl.cast(i_u // n_n, tl.int64)
        o_n = i_u % n_n * BN + tl.arange(0, BN)
        o_h = (o_n - prefix) // width + (i_h - KH // 2)
        o_w = (o_n - prefix) % width + (i_w - KW // 2)
        m_n = ((o_n >= prefix) & (o_n < N))[:, None] & m_c
        p_g = grad + i_b * s_gb + o_n.to(tl.int64)[:, None] * s_gn + o_c[None, :]
        o_x = (o_n + (i_h - KH // 2) * width + (i_w - KW // 2)).to(tl.int64)
        p_x = x + i_b * s_xb + o_x[:, None] * s_xn + o_c[None, :]
        if dx is not None:
            p_d = dx + i_b * s_db + o_n.to(tl.int64)[:, None] * s_dn + o_c[None, :]
            if i_u % n_n * BN < prefix:
                m_q = (o_n < prefix)[:, None] & m_c
                for i in range(T):
                    b_q = tl.zeros([BN, BC], dtype=dx.dtype.element_ty)
                    if COPY:
                        b_q = tl.load(p_g + tl.cast(i, tl.int64) * s_gt, mask=m_q)
                    tl.store(p_d + tl.cast(i, tl.int64) * s_dt, b_q, mask=m_q)
        for i_r in range(dilation):  # every dilation-th frame: those that meet each other
            i_f = i_r - (i_t - KT // 2) * dilation  # the gradient that this program's first tap leads to from frame i_r
            b_w = ()  # the gradients of the other taps, the earliest first
            for k in tl.static_range(1, GT):
                i_k = i_f - (GT - k) * dilation
                m_k = m_n & (i_k >= 0) & (i_k < T)
                b_w = push(b_w, widen(tl.load(p_g + tl.cast(i_k, tl.int64) * s_gt, mask=m_k, other=0)))
            for i_i in range(i_r, T, BT * dilation):
                b_g = ()
                b_x = ()
                for j in tl.static_range(BT):  # all loads of BT frames, then all products
                    i_j = i_i + j * dilation
                    i_k = i_f + (i_i - i_r) + j * dilation
                    m_k = m_n & (i_k >= 0) & (i_k < T)
                    b_g = push(b_g, tl.load(p_g + tl.cast(i_k, tl.int64) * s_gt, mask=m_k, other=0))
                    p_j = p_x + tl.cast(i_j, tl.int64) * s_xt
                    for s in tl.static_range(S):
                        m_x = m_n & (i_j < T)
                        if KH * KW > 1:
                            m_h = (o_h + s // GW >= 0) & (o_h + s // GW < height)
                            m_x = m_x & (m_h & (o_w + s % GW >= 0) & (o_w + s % GW < width))[:, None]
                            p_s = p_j + (s // GW * width + s % GW) * tl.cast(s_xn, tl.int64)
                        else:
                            p_s = p_j
                        b_x = push(b_x, tl.load(p_s, mask=m_x, other=0))
                for j in tl.static_range(BT):
                    b_w = push(b_w, widen(b_g[j]))
                    for s in tl.static_range(S):
                        b_xs = widen(b_x[j * S + s])
                        for k in tl.static_range(GT):
                            b_s = put(b_s, k * S + s, b_s[k * S + s] + b_w[GT - 1 - k] * b_xs)
                    b_c = b_w[GT - 1 - CENTRE]
                    b_b += b_c
                    if dx is not None:
                        b_d = tl.zeros([BN, BC], dtype=tl.float32)
                        for k in tl.static_range(KT):
                            b_d += b_w[GT - 1 - k] * b_k[k]
                        if RESIDUAL:
                            b_d += b_c
                        i_j = i_i + j * dilation
                        tl.store(p_d + tl.cast(i_j, tl.int64) * s_dt, b_d.to(dx.dtype.element_ty), mask=m_n & (i_j < T))
                    b_w = b_w[1:]

    p_s = sums + i_p.to(tl.int64) * (KT * KH * KW + 1) * C + o_c
    for k in tl.static_range(GT * S):
        j_t = i_t + k // S
        j_h = i_h + k % S // GW
        j_w = i_w + k % GW
        m_s = (o_c < C) & (j_t < KT) & (j_h < KH) & (j_w < KW)
        tl.store(p_s + ((j_t * KH + j_h) * KW + j_w) * C, tl.sum(b_s[k], 0), mask=m_s)
    m_b = (o_c < C) & (i_g == KT // 2 // GT * (n_h * n_w))
    tl.store(p_s + KT * KH * KW * C, tl.sum(b_b, 0), mask=m_b)


@triton.jit(do_not_specialize=["P"])
def temporal_conv_add_kernel(
    sums,  # [P, TAPS + 1, C] fp32
    dweight,  # [C, TAPS] or None
    dbias,  # [C] or None
    P, C,
    TAPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The sum over P, in order, turned and rounded: what follows the kernel above."""
    n_c = tl.cdiv(C, BC)
    i_k = tl.program_id(0) // n_c
    if dweight is None:
        i_k += TAPS
    o_c = tl.program_id(0) % n_c * BC + tl.arange(0, BC)
    o_p = tl.arange(0, BP)
    b_s = tl.zeros([BP, BC], dtype=tl.float32)
    for i_p in range(0, P, BP):
        p_s = sums + ((i_p + o_p).to(tl.int64)[:, None] * (TAPS + 1) + i_k) * C + o_c[None, :]
        b_s += tl.load(p_s, mask=(i_p + o_p < P)[:, None] & (o_c < C)[None, :], other=0)
    b_y = tl.sum(b_s, 0)
    if dweight is not None:
        tl.store(dweight + o_c * TAPS + i_k, b_y.to(dweight.dtype.element_ty), mask=(o_c < C) & (i_k < TAPS))
    if dbias is not None:
        tl.store(dbias + o_c, b_y.to(dbias.dtype.element_ty), mask=(o_c < C) & (i_k == TAPS))


def plan_backward(
    grad: Tensor, x: Tensor, rows: Tensor | None, dx: Tensor | None, kernel: tuple[int, ...], height: int, width: int,
    prefix: int, dilation: int, copy: bool = False, residual: bool = False,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch, and the partial sums that it writes: ``[P, taps + 1, C]``, the last of the bias. ``dx`` for a kernel over
    time alone, of weights ``rows [taps, C]``: it is written too, ``copy``: with the gradients of prefix tokens."""
    batch, frames, tokens, channels = x.shape
    kt, kh, kw = kernel
    gt, gh, gw = taps_of_a_program(kt, kh, kw)
    bn, bc = tile(tokens, channels, x.element_size())
    shares = cdiv(channels, bc) * cdiv(kt, gt) * cdiv(kh, gh) * cdiv(kw, gw)
    partials = max(1, min(WAVE // shares, batch * cdiv(tokens, bn)))
    sums = torch.empty(partials, kt * kh * kw + 1, channels, dtype=torch.float32, device=x.device)
    args: dict[str, Any] = {"grad": grad, "x": x, "weight": rows, "dx": dx}
    args |= {"sums": sums, "B": batch, "T": frames, "N": tokens, "C": channels, "height": height, "width": max(width, 1)}
    args |= {"prefix": prefix, "dilation": dilation, "P": partials, **strides(g=grad, x=x, d=x if dx is None else dx)}
    bt = min(max(1, (LOADS if gt <= 3 else LOADS // 2) // (1 + gh * gw)), pow2(cdiv(frames, dilation)))
    constexprs: dict[str, Any] = {"KT": kt, "KH": kh, "KW": kw, "GT": gt, "GH": gh, "GW": gw, "RESIDUAL": residual}
    constexprs |= {"COPY": copy and prefix > 0, "WHOLE": channels % bc == 0, "BT": bt, "BN": bn, "BC": bc}
    return Launch(temporal_conv_backward_kernel, partials * shares, args, constexprs), sums


def taps_of_a_program(kt: int, kh: int, kw: int) -> tuple[int, int, int]:
    """Its sums are that many times eight registers of a thread."""
    if kh * kw == 1:
        return min(kt, LONGEST), 1, 1
    if kt == 1:
        return 1, min(kh, 3), min(kw, 3)
    return min(kt, 3), 1, min(kw, 3)


def plan_add(sums: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> Launch:
    """The launch that makes gradients of partial sums."""
    partials, rows, channels = sums.shape
    args: dict[str, Any] = {"sums": sums, "dweight": dweight, "dbias": dbias, "P": partials, "C": channels}
    bc = min(32, pow2(channels))
    wanted = (0 if dweight is None else rows - 1) + (0 if dbias is None else 1)
    return Launch(temporal_conv_add_kernel, wanted * cdiv(channels, bc), args, {"TAPS": rows - 1, "BP": 64, "BC": bc})
