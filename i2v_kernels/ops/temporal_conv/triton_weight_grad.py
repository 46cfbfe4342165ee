"""Triton kernel of ``temporal_conv``'s weight gradient and its launcher. How it works and why: README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import Launch, cdiv
from .triton_tiles import strides, tile

PARTIALS = 512  # programs that share the sums


@triton.jit
def temporal_conv_weight_grad_kernel(
    grad, x,
    weight_sums,  # [P, taps, C] fp32
    bias_sums,  # [P, C] fp32
    B,
    T, N, C,
    height, width, prefix, dilation,
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
    i_d = (i_t - KT // 2) * dilation  # frames from a gradient to the first tap's input

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
        for i_r in range(dilation):  # every dilation-th frame: those that meet each other
            i_x = i_r + i_d
            p_g = grad + i_b * s_gb + tl.cast(i_r, tl.int64) * s_gt + o_n.to(tl.int64)[:, None] * s_gn + o_c[None, :]
            p_x = x + i_b * s_xb + i_x.to(tl.int64) * s_xt + o_x[:, None] * s_xn + o_c[None, :]
            b_x0 = tl.load(p_x, mask=m_x & (i_x >= 0) & (i_x < T), other=0).to(tl.float32)  # [BN, BC]
            i_x += dilation
            p_x += tl.cast(s_xt, tl.int64) * dilation
            b_x1 = tl.load(p_x, mask=m_x & (i_x >= 0) & (i_x < T), other=0).to(tl.float32)
            for _ in range(i_r, T, dilation):
                i_x += dilation
                p_x += tl.cast(s_xt, tl.int64) * dilation
                b_x2 = tl.load(p_x, mask=m_x & (i_x >= 0) & (i_x < T), other=0).to(tl.float32)
                b_g = tl.load(p_g, mask=m_g, other=0).to(tl.float32)
                b_0 += b_g * b_x0
                b_1 += b_g * b_x1
                b_2 += b_g * b_x2
                b_b += b_g
                b_x0 = b_x1
                b_x1 = b_x2
                p_g += tl.cast(s_gt, tl.int64) * dilation

    p_s = weight_sums + (i_p.to(tl.int64) * (KT * S) + i_t * S + i_k % S) * C + o_c
    m_c = o_c < C
    tl.store(p_s, tl.sum(b_0, 0), mask=m_c)
    tl.store(p_s + S * C, tl.sum(b_1, 0), mask=m_c & (i_t + 1 < KT))
    tl.store(p_s + 2 * S * C, tl.sum(b_2, 0), mask=m_c & (i_t + 2 < KT))
    tl.store(bias_sums + i_p.to(tl.int64) * C + o_c, tl.sum(b_b, 0), mask=m_c & (i_k == 0))


def plan_weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, prefix: int, dilation: int
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
    args |= {"prefix": prefix, "dilation": dilation, "P": partials, **strides(g=grad, x=x)}
    constexprs = {"KT": kt, "KH": kh, "KW": kw, "BN": bn, "BC": bc}
    return Launch(temporal_conv_weight_grad_kernel, partials * shares, args, constexprs), weight_sums, bias_sums
