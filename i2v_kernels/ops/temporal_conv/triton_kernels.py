"""Triton kernels of ``temporal_conv`` and of the gradient of its input. How they work and why: README.md beside this file."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_dense_like
from ..triton_activations import activate, activation_gradient
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run
from .gradients import gradients
from .triton_backward import TOGETHER, plan_add, plan_backward
from .triton_tiles import LONGEST, push, put, strides, taps, tile, widen

FRAMES = 8  # whose sums a thread holds


@triton.jit
def temporal_conv_kernel(
    x,
    weight,  # [taps, C]
    bias, extra, y,
    T, N, C,
    height, width, prefix, dilation,
    s_xb, s_xt, s_xn,
    s_eb, s_et, s_en,
    s_yb, s_yt, s_yn,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    GT: tl.constexpr,  # taps in time that are added together; divides KT
    FLIP: tl.constexpr,  # the kernel turned round: the gradient of the input
    COPY: tl.constexpr,  # prefix tokens are copied, else zero
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,  # extra is the gradient behind the activation, else it is added
    WHOLE: tl.constexpr,  # C is a multiple of BC
    ALONE: tl.constexpr,  # T is BT, dilation 1, GT is KT: which frames there are is known when compiled
    BT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    n_c = tl.cdiv(C, BC)
    n_t = tl.cdiv(tl.cdiv(T, dilation), BT) * dilation
    n_n = tl.cdiv(N, BN)
    i_c = i_p % n_c
    i_t = i_p // n_c % n_t
    i_n = i_p // n_c // n_t % n_n
    i_b = (i_p // n_c // n_t // n_n).to(tl.int64)
    i_0 = i_t % dilation + i_t // dilation * BT * dilation  # the first of every dilation-th frame: those that meet
    o_n = (i_n * BN + tl.arange(0, BN))[:, None]
    o_c = (i_c * BC + tl.arange(0, BC))[None, :]
    m_c = (o_c < C) | WHOLE
    m_n = (o_n < N) & m_c
    m_p = m_n & (o_n >= prefix)
    o_h = (o_n - prefix) // width
    o_w = (o_n - prefix) % width
    p_x = x + i_b * s_xb + o_n.to(tl.int64) * s_xn + o_c
    o_z = tl.zeros([BN, 1], dtype=tl.int32)  # every row loads weights and bias: they arrive in the tile's layout
    S: tl.constexpr = KH * KW

    b_0 = tl.zeros([BN, BC], dtype=tl.float32)
    if bias is not None:
        b_0 += tl.load(bias + o_c + o_z, mask=m_c, other=0).to(tl.float32)
    b_y = ()  # the sums of BT frames, [BN, BC] each
    for _ in tl.static_range(BT):
        b_y = push(b_y, b_0)
    for j in range(KT // GT * S):
        i_g = j // S * GT  # the first of the taps
        m_x = m_p
        p_j = p_x
        if S > 1:
            i_h = j % S // KW - KH // 2
            i_w = j % KW - KW // 2
            m_x = m_p & (o_h + i_h >= 0) & (o_h + i_h < height) & (o_w + i_w >= 0) & (o_w + i_w < width)
            p_j += (i_h * width + i_w) * tl.cast(s_xn, tl.int64)
        b_w = ()
        for k in tl.static_range(GT):
            i_k = (i_g + k) * S + j % S
            if FLIP:
                i_k = KT * S - 1 - i_k
            b_w = push(b_w, tl.load(weight + o_c + o_z + i_k * C, mask=m_c, other=0))
        b_x = ()  # frames that a tile's frames meet: loaded once for all taps in time, and all before the first product
        for i in tl.static_range(BT + GT - 1):
            if ALONE and (i < KT // 2 or i >= BT + KT // 2):
                b_x = push(b_x, b_0)  # is not read
            else:
                i_f = i_0 + (i + i_g - KT // 2) * dilation
                m_f = m_x if ALONE else m_x & (i_f >= 0) & (i_f < T)
                b_x = push(b_x, tl.load(p_j + tl.cast(i_f, tl.int64) * s_xt, mask=m_f, other=0))
        for i in tl.static_range(BT):
            for k in tl.static_range(GT):
                if not ALONE or (i + k >= KT // 2 and i + k < BT + KT // 2):
                    b_y = put(b_y, i, b_y[i] + widen(b_x[i + k]) * widen(b_w[k]))

    p_y = y + i_b * s_yb + o_n.to(tl.int64) * s_yn + o_c
    p_e = p_x
    s_e = s_xt
    if extra is not None:
        p_e = extra + i_b * s_eb + o_n.to(tl.int64) * s_en + o_c
        s_e = s_et
        b_e = ()
        for i in tl.static_range(BT):
            i_f = i_0 + i * dilation
            b_e = push(b_e, tl.load(p_e + tl.cast(i_f, tl.int64) * s_e, mask=m_p & (i_f < T), other=0).to(tl.float32))
    for i in tl.static_range(BT):
        if GRADIENT:
            b_a = activation_gradient(b_e[i], b_y[i], ACTIVATION)
        else:
            b_a = activate(b_y[i], ACTIVATION)
            if extra is not None:
                b_a += b_e[i]
        i_f = i_0 + i * dilation
        tl.store(p_y + tl.cast(i_f, tl.int64) * s_yt, b_a.to(y.dtype.element_ty), mask=m_p & (i_f < T))
    if i_n * BN < prefix:
        m_q = m_n & (o_n < prefix)
        for i_f in range(i_0, tl.minimum(i_0 + BT * dilation, T), dilation):
            b_q = tl.zeros([BN, BC], dtype=y.dtype.element_ty)
            if COPY:
                b_q = tl.load(p_e + tl.cast(i_f, tl.int64) * s_e, mask=m_q)  # what extra holds there x does too, or a gradient
            tl.store(p_y + tl.cast(i_f, tl.int64) * s_yt, b_q, mask=m_q)


def plan(
    x: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    extra: Tensor | None,
    y: Tensor,
    kernel: tuple[int, ...],
    height: int,
    width: int,
    prefix: int,
    prefix_mode: str,
    dilation: int,
    activation: str = "",
    gradient: bool = False,
    turned: bool = False,
) -> Launch:
    """The launch that writes y from x and the weights ``[taps, C]``: ``activation`` of the convolution plus ``extra``, or with
    ``gradient``: extra being the gradient behind the activation, that before it. ``turned`` turns the kernel round."""
    batch, frames, tokens, channels = x.shape
    kt, kh, kw = kernel
    copy = prefix_mode == "copy" and prefix > 0
    bn, bc = tile(tokens, channels, x.element_size())
    gt = max(k for k in range(1, LONGEST + 1) if kt % k == 0)
    bt = min(pow2(cdiv(frames, dilation)), FRAMES if gt <= 3 or kh * kw == 1 else FRAMES // 2)
    args: dict[str, Any] = {"x": x, "weight": rows, "bias": bias, "extra": extra, "y": y, "T": frames}
    args |= {"N": tokens, "C": channels, "height": height, "width": max(width, 1), "prefix": prefix, "dilation": dilation}
    args |= strides(x=x, e=x if extra is None else extra, y=y)
    constexprs: dict[str, Any] = {"KT": kt, "KH": kh, "KW": kw, "GT": gt, "FLIP": turned, "COPY": copy}
    constexprs |= {"ACTIVATION": activation, "GRADIENT": gradient, "WHOLE": channels % bc == 0}
    constexprs |= {"ALONE": bt == frames and dilation == 1 and gt == kt, "BT": bt, "BN": bn, "BC": bc}
    chunks = cdiv(cdiv(frames, dilation), bt) * dilation
    return Launch(temporal_conv_kernel, batch * chunks * cdiv(tokens, bn) * cdiv(channels, bc), args, constexprs)


def _convolve(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, extra: Tensor | None, height: int, width: int, prefix: int,
    prefix_mode: str, dilation: int, activation: str = "", gradient: bool = False, turned: bool = False,
) -> Tensor:  # fmt: skip
    if out.numel() > 0:
        grid = (height, width, prefix, prefix_mode, dilation)
        options = (tuple(weight.shape[2:]), *grid, activation, gradient, turned)
        run(plan, (x, taps(weight, weight.dtype), bias, extra, out), options)
    return out


def _sum_products(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int, prefix: int, dilation: int, wanted: list[bool],
    dx: Tensor | None = None, copy: bool = False, residual: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if wanted[1] else None
    dbias = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device) if wanted[2] else None
    if x.numel() > 0:
        rows = None if dx is None else taps(weight, torch.float32)
        options = (tuple(weight.shape[2:]), height, width, prefix, dilation, copy, residual)
        run(_plan_gradients, (grad, x, rows, dx, dweight, dbias), options)
    nothing = grad.new_empty(0)
    grads = [nothing if part is None else part if x.numel() > 0 else part.zero_() for part in (dweight, dbias)]
    return grads[0], grads[1]


def _plan_gradients(
    grad: Tensor, x: Tensor, rows: Tensor | None, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None,
    *options: Any,
) -> list[Launch]:  # fmt: skip
    launch, sums = plan_backward(grad, x, rows, dx, *options)
    return [launch, plan_add(sums, dweight, dbias)]


def _together(kt: int, kh: int, kw: int) -> bool:
    return kh * kw == 1 and kt <= TOGETHER


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """``[B, T, N, C]``, ``[C, 1, kt, kh, kw]``, ``[C]`` -> ``[B, T, N, C]``."""
    *options, residual = rest
    return _convolve(empty_dense_like(x), x, weight, bias, x if residual else None, *options)


backward = partial(gradients, _convolve, _sum_products, _together)


def _meta(dtype: torch.dtype, kernel: tuple[int, ...], channels: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty(8, 8, 197, channels, dtype=dtype, device="meta")  # ST-Adapter on ViT-B/16, and its full width
    weight = torch.empty(channels, 1, *kernel, dtype=dtype, device="meta")
    return x, weight, torch.empty(channels, dtype=dtype, device="meta")


def _forward_entry(
    *kernel: int, what: str = "", channels: int = 384, dilation: int = 1, residual: bool = False, **more: Any
) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, bias = _meta(dtype, kernel, channels)
        extra = x if residual or more.get("gradient") else None
        return plan(x, taps(weight, dtype), bias, extra, torch.empty_like(x), kernel, 14, 14, 1, "copy", dilation, **more)

    return _entry(f"temporal_conv {kernel}{what}", channels, launch)


def _input_grad_entry(*kernel: int) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, _ = _meta(dtype, kernel, 384)
        return plan(x, taps(weight, dtype), None, None, torch.empty_like(x), kernel, 14, 14, 1, "zero", 1, turned=True)

    return Entry(f"temporal_conv input gradient {kernel}", launch)


def _weight_grad_entry(*kernel: int, channels: int = 384) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, _, _ = _meta(dtype, kernel, channels)
        return plan_backward(torch.empty_like(x), x, None, None, kernel, 14, 14, 1, 1)[0]

    return _entry(f"temporal_conv weight gradient {kernel}", channels, launch)


def _both_entry(*kernel: int, channels: int = 384, dilation: int = 1, residual: bool = False) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, _ = _meta(dtype, kernel, channels)
        grad, dx = torch.empty_like(x), torch.empty_like(x)
        rows = taps(weight, torch.float32)
        return plan_backward(grad, x, rows, dx, kernel, 14, 14, 1, dilation, copy=residual, residual=residual)[0]

    what = f"{f' dilation {dilation}' if dilation > 1 else ''}{' residual' if residual else ''}"
    return _entry(f"temporal_conv gradients {kernel}{what}", channels, launch)


def _add_entry(*kernel: int, channels: int = 384) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        x, weight, bias = _meta(dtype, kernel, channels)
        return plan_add(plan_backward(x, x, None, None, kernel, 14, 14, 1, 1)[1], weight, bias)

    return _entry(f"temporal_conv sum of parts {kernel}", channels, launch)


def _entry(name: str, channels: int, launch: Callable[[torch.dtype], Launch]) -> Entry:
    """Other widths than the adapter's in one dtype."""
    if channels == 384:
        return Entry(name, launch)
    return Entry(f"{name} C {channels}", launch, (torch.bfloat16,))


def _ones(dtype: torch.dtype, *kernel: int) -> Launch:
    x = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta")
    if not kernel:
        rows = torch.empty(3, 1, device="meta")
        return plan_backward(x, x, rows, x, (3, 1, 1), 1, 1, 0, 1)[0]
    rows = torch.empty(math.prod(kernel), 1, dtype=dtype, device="meta")
    return plan(x, rows, x[0, 0, 0], None, x, kernel, 1, 1, 0, "zero", 1)


AOT = [
    _forward_entry(3, 1, 1),
    _forward_entry(3, 1, 1, channels=768),
    _forward_entry(5, 1, 1),
    _forward_entry(1, 3, 3),
    _forward_entry(3, 3, 3),
    _forward_entry(3, 3, 3, channels=768),
    _forward_entry(5, 5, 5),
    _forward_entry(3, 1, 1, what=" residual", residual=True),
    _forward_entry(3, 1, 1, what=" gelu", activation="gelu"),
    _forward_entry(3, 1, 1, what=" gelu gradient", activation="gelu", gradient=True),
    _forward_entry(3, 1, 1, what=" dilation 2", dilation=2),
    _forward_entry(3, 3, 3, what=" quick_gelu residual", activation="quick_gelu", residual=True),
    _forward_entry(3, 3, 3, what=" quick_gelu gradient", activation="quick_gelu", gradient=True),
    _input_grad_entry(3, 1, 1),
    _input_grad_entry(3, 3, 3),
    _both_entry(3, 1, 1),
    _both_entry(3, 1, 1, channels=768),
    _both_entry(3, 1, 1, residual=True),
    _both_entry(3, 1, 1, dilation=2),
    _both_entry(5, 1, 1),
    _weight_grad_entry(3, 1, 1),
    _weight_grad_entry(7, 1, 1),
    _weight_grad_entry(1, 3, 3),
    _weight_grad_entry(3, 3, 3),
    _weight_grad_entry(3, 3, 3, channels=768),
    _add_entry(3, 1, 1),
    _add_entry(3, 3, 3, channels=768),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("temporal_conv (3, 1, 1), all sizes 1", lambda dtype: _ones(dtype, 3, 1, 1), (torch.bfloat16,), vectors=False),
    Entry("temporal_conv (3, 3, 3), all sizes 1", lambda dtype: _ones(dtype, 3, 3, 3), (torch.bfloat16,), vectors=False),
    Entry("temporal_conv gradients, all sizes 1", _ones, (torch.bfloat16,), vectors=False),
]
