"""Triton kernels of ``temporal_attention`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import Entry, Launch, run
from .packing import empty_grads, empty_output, unpacked
from .triton_long import plan_long_backward
from .triton_tiles import (
    common,
    constants,
    dot_within,
    pointers,
    read,
    rows,
    scores,
    strides,
    tiles,
    units,
    valid_keys,
    write,
)

PARTIALS = 1024  # programs that share the sums of the bias' gradient


@triton.jit
def temporal_attention_kernel(
    q, k, v, bias, mask, o,
    T, N, H, D, scale,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_ob, s_ot, s_on, s_oh,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the operands of products
    PRECISION: tl.constexpr,
    TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = BQ // TP if TP <= BQ else 1
    n_q: tl.constexpr = 1 if TP <= BQ else TP // BQ
    n_k: tl.constexpr = 1 if TP <= BQ else TP // BK
    n_n = tl.cdiv(N, S)
    i_p = tl.program_id(0)
    i_q = i_p % n_q
    i_h = i_p // n_q % H
    i_n = i_p // n_q // H % n_n
    i_b = i_p // n_q // H // n_n
    o_jq, o_t = rows(i_q, BQ, TP)
    m_q = (i_n * S + o_jq < N) & (o_t < T)
    b_q = read(pointers(q, i_b, i_h, o_t, i_n * S + o_jq, s_qb, s_qt, s_qn, s_qh, BD), m_q, D, BD, DOT)  # [BQ, BD]

    b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)  # largest score so far
    b_l = tl.zeros([BQ], dtype=tl.float32)
    b_any = tl.zeros([BQ], dtype=tl.int32)  # whether the query may look at anything
    b_o = tl.zeros([BQ, BD], dtype=tl.float32)
    for i_k in range(n_k):
        o_jk, o_s = rows(i_k, BK, TP)
        o_n = i_n * S + o_jk
        m_k = (o_n < N) & (o_s < T)
        p_v = pointers(v, i_b, i_h, o_s, o_n, s_vb, s_vt, s_vn, s_vh, BD)
        b_k = read(pointers(k, i_b, i_h, o_s, o_n, s_kb, s_kt, s_kn, s_kh, BD), m_k, D, BD, DOT)  # [BK, BD]
        b_v = read(p_v, m_k, D, BD, DOT)
        _, m_valid = valid_keys(o_jq, o_t, o_jk, o_s, mask, i_b, T, CAUSAL)
        b_s = scores(b_q, b_k, bias, i_h, o_t, o_s, m_valid, scale, T, PRECISION)  # [BQ, BK]
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        if mask is not None:
            b_any = tl.maximum(b_any, tl.max(m_valid.to(tl.int32), 1))
        if n_k == 1:
            b_l = tl.sum(b_p, 1)
            b_o = dot_within(b_p.to(DOT), b_v, p_v, m_k, o_jk, D, S, BD, DOT, PRECISION)
        else:
            b_alpha = tl.exp2(b_m - b_safe)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_o = b_o * b_alpha[:, None] + tl.dot(b_p.to(DOT), b_v, input_precision=PRECISION)
            b_m = b_new
    if mask is not None:
        b_l = tl.where(b_any > 0, b_l, 1.0)
    p_o = pointers(o, i_b, i_h, o_t, i_n * S + o_jq, s_ob, s_ot, s_on, s_oh, BD)
    write(p_o, b_o / b_l[:, None], m_q, D, BD)


@triton.jit
def temporal_attention_backward_kernel(
    g, q, k, v, bias, mask, dq, dk, dv,
    bias_sums,  # [P * S, H, T, T] fp32
    T, N, H, D, scale,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_dqb, s_dqt, s_dqn, s_dqh,
    s_dkb, s_dkt, s_dkn, s_dkh,
    s_dvb, s_dvt, s_dvn, s_dvh,
    B, P,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Whole sequences in a tile. With bias_sums a program takes every P-th tile, else one (P is their number)."""
    S: tl.constexpr = BQ // TP
    n_n = tl.cdiv(N, S)
    i_h = tl.program_id(0) % H
    i_p = tl.program_id(0) // H
    o_j, o_t = rows(0, BQ, TP)
    b_bias = tl.zeros([BQ, BQ], dtype=tl.float32)
    for i_u in range(i_p, B * n_n, P):
        i_b = tl.cast(i_u // n_n, tl.int64)
        o_n = i_u % n_n * S + o_j
        m_r = (o_n < N) & (o_t < T)
        p_q = pointers(q, i_b, i_h, o_t, o_n, s_qb, s_qt, s_qn, s_qh, BD)
        p_k = pointers(k, i_b, i_h, o_t, o_n, s_kb, s_kt, s_kn, s_kh, BD)
        p_g = pointers(g, i_b, i_h, o_t, o_n, s_gb, s_gt, s_gn, s_gh, BD)
        b_q = read(p_q, m_r, D, BD, DOT)  # [BQ, BD]
        b_k = read(p_k, m_r, D, BD, DOT)
        b_g = read(p_g, m_r, D, BD, DOT)
        b_v = read(pointers(v, i_b, i_h, o_t, o_n, s_vb, s_vt, s_vn, s_vh, BD), m_r, D, BD, DOT)
        m_same, m_valid = valid_keys(o_j, o_t, o_j, o_t, mask, i_b, T, CAUSAL)
        b_s = scores(b_q, b_k, bias, i_h, o_t, o_t, m_valid, scale, T, PRECISION)  # [BQ, BQ]
        b_m = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - tl.where(b_m == float("-inf"), 0.0, b_m)[:, None])
        b_l = tl.sum(b_p, 1)
        if mask is not None:
            b_l = tl.where(tl.max(m_valid.to(tl.int32), 1) > 0, b_l, 1.0)
        m_same = m_same & m_r[:, None]
        b_p = tl.where(m_same, b_p / b_l[:, None], 0.0)
        b_dp = tl.where(m_same, tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION), 0.0)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        b_ds = tl.where(m_valid & m_r[:, None], b_ds, 0.0)
        if bias_sums is not None:
            b_bias += b_ds
        b_dv = dot_within(tl.trans(b_p.to(DOT)), b_g, p_g, m_r, o_j, D, S, BD, DOT, PRECISION)
        write(pointers(dv, i_b, i_h, o_t, o_n, s_dvb, s_dvt, s_dvn, s_dvh, BD), b_dv, m_r, D, BD)
        b_ds = (b_ds * scale).to(DOT)
        b_dq = dot_within(b_ds, b_k, p_k, m_r, o_j, D, S, BD, DOT, PRECISION)
        write(pointers(dq, i_b, i_h, o_t, o_n, s_dqb, s_dqt, s_dqn, s_dqh, BD), b_dq, m_r, D, BD)
        b_dk = dot_within(tl.trans(b_ds), b_q, p_q, m_r, o_j, D, S, BD, DOT, PRECISION)
        write(pointers(dk, i_b, i_h, o_t, o_n, s_dkb, s_dkt, s_dkn, s_dkh, BD), b_dk, m_r, D, BD)

    if bias_sums is not None:
        p_bias = bias_sums + ((i_p.to(tl.int64) * S + o_j) * H + i_h)[:, None] * T * T + o_t[:, None] * T + o_t[None, :]
        tl.store(p_bias, b_bias, mask=(o_j[:, None] == o_j[None, :]) & (o_t < T)[:, None] & (o_t < T)[None, :])


def plan(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor, scale: float, causal: bool
) -> Launch:
    """The launch that writes out."""
    tile = tiles(q.shape[1], q.shape[4], q.element_size(), backward=False)
    args = {"q": q, "k": k, "v": v, "o": out, **common(q, bias, mask, scale), **strides(q=q, k=k, v=v, o=out)}
    programs = units(q, tile) * q.shape[3] * tile.blocks
    return Launch(temporal_attention_kernel, programs, args, constants(q.dtype, causal, tile), tile.threads)


def plan_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dq: Tensor, dk: Tensor,
    dv: Tensor, scale: float, causal: bool, bias_grad: bool,
) -> tuple[list[Launch], Tensor | None]:  # fmt: skip
    """The launches that write dq, dk, dv and, if wanted, sums over shares of the tokens of the bias' gradient."""
    batch, frames, _, heads, dim = q.shape
    tile = tiles(frames, dim, q.element_size(), backward=True)
    args: dict[str, Any] = {"g": g, "q": q, "k": k, "v": v, **common(q, bias, mask, scale)}
    args |= {"dq": dq, "dk": dk, "dv": dv, **strides(g=g, q=q, k=k, v=v, dq=dq, dk=dk, dv=dv)}
    if tile.blocks > 1:
        return plan_long_backward(args, tile, causal, bias_grad)
    shares, bias_sums = units(q, tile), None
    if bias_grad:
        shares = max(1, min(shares, PARTIALS // heads))
        bias_sums = torch.empty(shares * tile.tokens, heads, frames, frames, dtype=torch.float32, device=q.device)
    args |= {"bias_sums": bias_sums, "B": batch, "P": shares}
    constexprs = constants(q.dtype, causal, tile)
    return [Launch(temporal_attention_backward_kernel, shares * heads, args, constexprs, tile.threads)], bias_sums


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """``[B, T, N, H, D]`` -> the same."""
    out = empty_output(q)
    if out.numel() > 0:
        run([plan(*unpacked(q, k, v), bias, mask, out, scale, causal)], q.device)
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, scale: float,
    causal: bool, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and bias; the last is empty if it is not wanted."""
    dq, dk, dv, dbias = empty_grads(grad, q, k, v, bias, bias_grad)
    if q.numel() == 0:
        return dq, dk, dv, dbias.zero_()
    launches, bias_sums = plan_backward(
        grad, *unpacked(q, k, v), bias, mask, *unpacked(dq, dk, dv), scale, causal, bias_grad
    )
    run(launches, q.device)
    return dq, dk, dv, dbias if bias_sums is None else bias_sums.sum(0).to(dbias.dtype)


def _ones(dtype: torch.dtype, backward: bool) -> Launch:
    q = torch.empty(1, 1, 1, 1, 1, dtype=dtype, device="meta")
    if backward:
        return plan_backward(q, q, q, q, None, None, q, q, q, 1.0, False, False)[0][0]
    return plan(q, q, q, None, None, q, 1.0, False)


def _meta(frames: int, dim: int, dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    heads = 768 // dim
    if packed:
        qkv = torch.empty(8, frames, 197, 3, heads, dim, dtype=dtype, device="meta")
        return qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
    q = torch.empty(8, frames, 197, heads, dim, dtype=dtype, device="meta")
    return q, torch.empty_like(q), torch.empty_like(q)


def _forward_entry(frames: int, dim: int, extras: bool = False, packed: bool = False) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        q, k, v = _meta(frames, dim, dtype, packed)
        bias = torch.empty(q.shape[3], frames, frames, device="meta") if extras else None
        mask = torch.empty(8, frames, dtype=torch.bool, device="meta") if extras else None
        return plan(q, k, v, bias, mask, torch.empty(q.shape, dtype=dtype, device="meta"), dim**-0.5, extras)

    kind = " bias mask causal" * extras + " packed qkv" * packed
    return Entry(f"temporal_attention T{frames} D{dim}{kind}", launch, dots=True)


def _backward_entries(frames: int, dim: int, extras: bool = False) -> list[Entry]:
    def launches(dtype: torch.dtype) -> list[Launch]:
        q, k, v = _meta(frames, dim, dtype, packed=False)
        bias = torch.empty(q.shape[3], frames, frames, device="meta") if extras else None
        mask = torch.empty(8, frames, dtype=torch.bool, device="meta") if extras else None
        outs = (torch.empty_like(q) for _ in range(4))
        g, dq, dk, dv = outs
        return plan_backward(g, q, k, v, bias, mask, dq, dk, dv, dim**-0.5, extras, extras)[0]

    name = f"temporal_attention backward T{frames} D{dim}" + " bias mask causal" * extras
    entries = []
    for dtypes in ((torch.float16, torch.bfloat16), (torch.float32,)):  # their tiles differ, and so may their kernels
        count = len(launches(dtypes[0]))
        for i in range(count):
            launch = partial(lambda i, dtype: launches(dtype)[i], i)
            entries.append(Entry(f"{name} {i + 1}/{count}", launch, dtypes, dots=True))
    return entries


AOT = [
    _forward_entry(4, 64),
    _forward_entry(8, 64),
    _forward_entry(8, 64, packed=True),
    _forward_entry(8, 64, extras=True),
    _forward_entry(16, 64),
    _forward_entry(32, 64),
    _forward_entry(64, 64),
    _forward_entry(128, 128),
    _forward_entry(128, 256),
    *_backward_entries(8, 64),
    *_backward_entries(8, 64, extras=True),
    *_backward_entries(32, 128),
    *_backward_entries(32, 256),
    *_backward_entries(64, 64),
    *_backward_entries(128, 256, extras=True),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("temporal_attention, all sizes 1", partial(_ones, backward=False), (torch.bfloat16,), True, False),
    Entry("temporal_attention backward, all sizes 1", partial(_ones, backward=True), (torch.bfloat16,), True, False),
]
