"""Triton kernels of ``frame_pool`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_dense_like
from ..triton_common import Launch, cdiv, pow2
from ..triton_launch import run

BLOCK = 1024  # elements of a tile


@triton.jit
def frame_pool_kernel(x, y, T, N, C, s_xb, s_xt, s_xn, s_yb, s_yn, BN: tl.constexpr, BC: tl.constexpr):
    i_p = tl.program_id(0)
    i_c, i_r = i_p % tl.cdiv(C, BC), i_p // tl.cdiv(C, BC)
    i_n, i_b = i_r % tl.cdiv(N, BN), (i_r // tl.cdiv(N, BN)).to(tl.int64)
    o_n, o_c = (i_n * BN + tl.arange(0, BN)).to(tl.int64), i_c * BC + tl.arange(0, BC)
    m = (o_n < N)[:, None] & (o_c < C)[None, :]  # [BN, BC]
    p_x = x + i_b * s_xb + (o_n * s_xn)[:, None] + o_c[None, :]
    b_sum = tl.zeros((BN, BC), dtype=tl.float32)
    for _ in range(T):
        b_sum += tl.load(p_x, mask=m, other=0).to(tl.float32)
        p_x += s_xt
    tl.store(y + i_b * s_yb + (o_n * s_yn)[:, None] + o_c[None, :], (b_sum / T).to(y.dtype.element_ty), mask=m)


@triton.jit
def frame_pool_backward_kernel(dy, dx, T, N, C, s_yb, s_yn, s_xb, s_xt, s_xn, BN: tl.constexpr, BC: tl.constexpr):
    i_p = tl.program_id(0)
    i_c, i_r = i_p % tl.cdiv(C, BC), i_p // tl.cdiv(C, BC)
    i_n, i_b = i_r % tl.cdiv(N, BN), (i_r // tl.cdiv(N, BN)).to(tl.int64)
    o_n, o_c = (i_n * BN + tl.arange(0, BN)).to(tl.int64), i_c * BC + tl.arange(0, BC)
    m = (o_n < N)[:, None] & (o_c < C)[None, :]  # [BN, BC]
    b_dy = tl.load(dy + i_b * s_yb + (o_n * s_yn)[:, None] + o_c[None, :], mask=m, other=0).to(tl.float32)
    b_dx = (b_dy / T).to(dx.dtype.element_ty)
    p_x = dx + i_b * s_xb + (o_n * s_xn)[:, None] + o_c[None, :]
    for _ in range(T):
        tl.store(p_x, b_dx, mask=m)
        p_x += s_xt


def _launch(kernel: object, pooled: Tensor, tokens: Tensor, **tensors: Tensor) -> Launch:
    """``pooled [B, N, C]``, ``tokens [B, T, N, C]``."""
    batch, count, channels = pooled.shape
    width = min(pow2(channels), BLOCK)
    rows = min(pow2(count), BLOCK // width)
    strides = zip(("s_yb", "s_yn", "s_xb", "s_xt", "s_xn"), (*pooled.stride()[:2], *tokens.stride()[:3]))
    args = {**tensors, "T": tokens.shape[1], "N": count, "C": channels, **dict(strides)}
    programs = batch * cdiv(count, rows) * cdiv(channels, width)
    return Launch(kernel, programs, args, {"BN": rows, "BC": width})


def plan(x: Tensor, y: Tensor) -> Launch:
    return _launch(frame_pool_kernel, y, x, x=x, y=y)


def plan_backward(dy: Tensor, dx: Tensor) -> Launch:
    return _launch(frame_pool_backward_kernel, dy, dx, dy=dy, dx=dx)


def forward(x: Tensor) -> Tensor:
    out = empty_dense_like(x[:, 0])
    if out.numel() > 0:
        run(plan, (x, out), ())
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    dx = empty_dense_like(x)
    if dx.numel() > 0:
        run(plan_backward, (grad, dx), ())
    return dx
