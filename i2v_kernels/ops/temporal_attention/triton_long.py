"""The backward of ``temporal_attention`` where a sequence is longer than a tile: three kernels, one sequence at a time.

``rows`` writes dq and, per query, the logarithm of the softmax' sum and <softmax, its gradient>; ``columns`` writes dk
and dv from these; ``bias`` sums the gradient of the scores over shares of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import Launch
from .triton_tiles import Tiles, frames_of, pointers, read, rows, scores, units, valid_keys, write

PARTIALS = 1024  # programs that share the sums of the bias' gradient


@triton.jit
def temporal_attention_backward_rows_kernel(
    g, q, k, v, bias, mask, dq, lse, delta,  # lse, delta: [B, N, H, TQ] fp32
    TQ, TK, N, H, scale, LEFT, RIGHT,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_dqb, s_dqt, s_dqn, s_dqh,
    OFFSETS: tl.constexpr, HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_q = i_p % (TP // BQ)
    i_row = i_p // (TP // BQ)
    i_h = i_row % H
    i_n = i_row // H % N
    i_b = i_row // H // N
    o_j, o_t = rows(i_q, BQ, TP)
    m_q = o_t < TQ
    o_n = i_n + o_j
    p_q = pointers(q, i_b, i_h, o_t, o_n, s_qb, s_qt, s_qn, s_qh, BD, UNIT)
    p_g = pointers(g, i_b, i_h, o_t, o_n, s_gb, s_gt, s_gn, s_gh, BD, UNIT)
    # float32 operands that outlive a product are kept in registers, more than there are: they are read again instead,
    # and no address is kept from before the loop
    AGAIN: tl.constexpr = DOT == tl.float32  # noqa: SIM300
    b_q = read(p_q, m_q, D, BD, DOT)  # [BQ, BD]
    b_g = read(p_g, m_q, D, BD, DOT)
    b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BQ], dtype=tl.float32)
    b_delta = tl.zeros([BQ], dtype=tl.float32)
    b_any = tl.zeros([BQ], dtype=tl.int32)
    for i_k in tl.range(tl.cdiv(TK, BK), disable_licm=AGAIN):
        if AGAIN:
            b_q = read(p_q, m_q, D, BD, DOT)
            b_g = read(p_g, m_q, D, BD, DOT)
        o_jk, o_s = rows(i_k, BK, TP)
        o_f = frames_of(o_s, i_h, TK, OFFSETS, HEADS)
        b_k = read(pointers(k, i_b, i_h, o_f, i_n + o_jk, s_kb, s_kt, s_kn, s_kh, BD, UNIT), o_s < TK, D, BD, DOT)
        b_v = read(pointers(v, i_b, i_h, o_f, i_n + o_jk, s_vb, s_vt, s_vn, s_vh, BD, UNIT), o_s < TK, D, BD, DOT)
        m_same, m_valid = valid_keys(o_j, o_t, o_jk, o_s, o_f, mask, i_b, TQ, TK, LEFT, RIGHT)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_s = scores(b_qk, bias, i_h, o_t, o_s, m_valid, scale, TQ, TK)  # [BQ, BK]
        b_dp = tl.where(m_same, tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION), 0.0)
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_m - b_safe)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_delta = b_delta * b_alpha + tl.sum(b_p * b_dp, 1)
        b_any = tl.maximum(b_any, tl.max(m_valid.to(tl.int32), 1))
        b_m = b_new
    # a query that may look at nothing: probability 2 ** (-inf - 0) = 0 everywhere
    b_l = tl.where(b_any > 0, b_l, 1.0)
    b_lse = tl.where(b_any > 0, b_m, 0.0) + tl.log2(b_l)
    b_delta = b_delta / b_l
    o_row = i_row.to(tl.int64) * TQ + o_t
    tl.store(lse + o_row, b_lse, mask=m_q)
    tl.store(delta + o_row, b_delta, mask=m_q)

    b_dq = tl.zeros([BQ, BD], dtype=tl.float32)
    for i_k in range(tl.cdiv(TK, BK)):
        if AGAIN:
            b_q = read(p_q, m_q, D, BD, DOT)
            b_g = read(p_g, m_q, D, BD, DOT)
        o_jk, o_s = rows(i_k, BK, TP)
        o_f = frames_of(o_s, i_h, TK, OFFSETS, HEADS)
        b_k = read(pointers(k, i_b, i_h, o_f, i_n + o_jk, s_kb, s_kt, s_kn, s_kh, BD, UNIT), o_s < TK, D, BD, DOT)
        b_v = read(pointers(v, i_b, i_h, o_f, i_n + o_jk, s_vb, s_vt, s_vn, s_vh, BD, UNIT), o_s < TK, D, BD, DOT)
        m_same, m_valid = valid_keys(o_j, o_t, o_jk, o_s, o_f, mask, i_b, TQ, TK, LEFT, RIGHT)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_s = scores(b_qk, bias, i_h, o_t, o_s, m_valid, scale, TQ, TK)
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        b_ds = tl.where(m_valid & m_q[:, None], tl.exp2(b_s - b_lse[:, None]) * (b_dp - b_delta[:, None]), 0.0)
        b_dq += tl.dot((b_ds * scale).to(DOT), b_k, input_precision=PRECISION)
    write(pointers(dq, i_b, i_h, o_t, o_n, s_dqb, s_dqt, s_dqn, s_dqh, BD, UNIT), b_dq, m_q, D, BD)


@triton.jit
def probabilities(
    b_g, b_q, b_k, b_v, bias, mask, lse, delta, i_b, i_h, i_row, i_q, i_k, o_f, scale, TQ, TK, LEFT, RIGHT,
    PRECISION: tl.constexpr, TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``[BQ, BK]``: the softmax, and the gradient of its argument; both zero behind the last frame."""
    o_jq, o_t = rows(i_q, BQ, TP)
    o_jk, o_s = rows(i_k, BK, TP)
    m_q = o_t < TQ
    m_same, m_valid = valid_keys(o_jq, o_t, o_jk, o_s, o_f, mask, i_b, TQ, TK, LEFT, RIGHT)
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_s = scores(b_qk, bias, i_h, o_t, o_s, m_valid, scale, TQ, TK)
    o_row = i_row.to(tl.int64) * TQ + o_t
    b_lse = tl.load(lse + o_row, mask=m_q, other=0)
    b_delta = tl.load(delta + o_row, mask=m_q, other=0)
    b_p = tl.where(m_same & m_q[:, None], tl.exp2(b_s - b_lse[:, None]), 0.0)
    b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    b_ds = tl.where(m_valid & m_q[:, None], b_p * (b_dp - b_delta[:, None]), 0.0)
    return b_p, b_ds


@triton.jit
def temporal_attention_backward_columns_kernel(
    g, q, k, v, bias, mask, dk, dv, lse, delta,
    TQ, TK, N, H, scale, LEFT, RIGHT,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_dkb, s_dkt, s_dkn, s_dkh,
    s_dvb, s_dvt, s_dvn, s_dvh,
    OFFSETS: tl.constexpr, HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_k = i_p % (TP // BK)
    i_row = i_p // (TP // BK)
    i_h = i_row % H
    i_n = i_row // H % N
    i_b = i_row // H // N
    o_jk, o_s = rows(i_k, BK, TP)
    o_f = frames_of(o_s, i_h, TK, OFFSETS, HEADS)
    m_k = o_s < TK
    o_n = i_n + o_jk
    b_k = read(pointers(k, i_b, i_h, o_f, o_n, s_kb, s_kt, s_kn, s_kh, BD, UNIT), m_k, D, BD, DOT)  # [BK, BD]
    b_v = read(pointers(v, i_b, i_h, o_f, o_n, s_vb, s_vt, s_vn, s_vh, BD, UNIT), m_k, D, BD, DOT)
    b_dk = tl.zeros([BK, BD], dtype=tl.float32)
    b_dv = tl.zeros([BK, BD], dtype=tl.float32)
    for i_q in range(tl.cdiv(TQ, BQ)):
        o_jq, o_t = rows(i_q, BQ, TP)
        b_q = read(pointers(q, i_b, i_h, o_t, i_n + o_jq, s_qb, s_qt, s_qn, s_qh, BD, UNIT), o_t < TQ, D, BD, DOT)
        b_g = read(pointers(g, i_b, i_h, o_t, i_n + o_jq, s_gb, s_gt, s_gn, s_gh, BD, UNIT), o_t < TQ, D, BD, DOT)
        b_p, b_ds = probabilities(
            b_g, b_q, b_k, b_v, bias, mask, lse, delta, i_b, i_h, i_row, i_q, i_k, o_f, scale, TQ, TK, LEFT, RIGHT,
            PRECISION, TP, BQ, BK,
        )  # fmt: skip
        b_dv += tl.dot(tl.trans(b_p.to(DOT)), b_g, input_precision=PRECISION)
        b_dk += tl.dot(tl.trans((b_ds * scale).to(DOT)), b_q, input_precision=PRECISION)
    write(pointers(dk, i_b, i_h, o_s, o_n, s_dkb, s_dkt, s_dkn, s_dkh, BD, UNIT), b_dk, m_k, D, BD)
    write(pointers(dv, i_b, i_h, o_s, o_n, s_dvb, s_dvt, s_dvn, s_dvh, BD, UNIT), b_dv, m_k, D, BD)


@triton.jit(do_not_specialize=["B", "P"])
def temporal_attention_backward_bias_kernel(
    g, q, k, v, bias, mask, lse, delta,
    bias_sums,  # [P, H, TQ, TK] fp32
    TQ, TK, N, H, scale, LEFT, RIGHT,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    B, P,
    OFFSETS: tl.constexpr, HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0)
    i_k = i_g % (TP // BK)
    i_q = i_g // (TP // BK) % (TP // BQ)
    i_h = i_g // (TP // BK) // (TP // BQ) % H
    i_p = i_g // (TP // BK) // (TP // BQ) // H
    o_jq, o_t = rows(i_q, BQ, TP)
    o_jk, o_s = rows(i_k, BK, TP)
    o_f = frames_of(o_s, i_h, TK, OFFSETS, HEADS)
    b_bias = tl.zeros([BQ, BK], dtype=tl.float32)
    for i_u in range(i_p, B * N, P):
        i_b = tl.cast(i_u // N, tl.int64)
        i_n = i_u % N
        b_q = read(pointers(q, i_b, i_h, o_t, i_n + o_jq, s_qb, s_qt, s_qn, s_qh, BD, UNIT), o_t < TQ, D, BD, DOT)
        b_g = read(pointers(g, i_b, i_h, o_t, i_n + o_jq, s_gb, s_gt, s_gn, s_gh, BD, UNIT), o_t < TQ, D, BD, DOT)
        b_k = read(pointers(k, i_b, i_h, o_f, i_n + o_jk, s_kb, s_kt, s_kn, s_kh, BD, UNIT), o_s < TK, D, BD, DOT)
        b_v = read(pointers(v, i_b, i_h, o_f, i_n + o_jk, s_vb, s_vt, s_vn, s_vh, BD, UNIT), o_s < TK, D, BD, DOT)
        i_row = tl.cast(i_u, tl.int64) * H + i_h
        _, b_ds = probabilities(
            b_g, b_q, b_k, b_v, bias, mask, lse, delta, i_b, i_h, i_row, i_q, i_k, o_f, scale, TQ, TK, LEFT, RIGHT,
            PRECISION, TP, BQ, BK,
        )  # fmt: skip
        b_bias += b_ds
    p_bias = bias_sums + (i_p.to(tl.int64) * H + i_h) * TQ * TK + o_t[:, None] * TK + o_s[None, :]
    tl.store(p_bias, b_bias, mask=(o_t < TQ)[:, None] & (o_s < TK)[None, :])


def plan_long_backward(
    args: dict[str, Any], tile: Tiles, constexprs: dict[str, Any], bias_grad: bool
) -> tuple[list[Launch], Tensor | None]:
    """The launches, and the partial sums of the bias' gradient if it is wanted."""
    q = args["q"]
    batch, frames, tokens, heads, _ = q.shape
    args["lse"], args["delta"] = torch.empty(2, batch, tokens, heads, frames, dtype=torch.float32, device=q.device)
    count = units(q, tile) * heads
    queries, keys = tile.TP // tile.BQ, tile.TP // tile.BK
    launches = [
        _launch(temporal_attention_backward_rows_kernel, count * queries, args, constexprs, tile),
        _launch(temporal_attention_backward_columns_kernel, count * keys, args, constexprs, tile),
    ]
    if not bias_grad:
        return launches, None
    shares = max(1, min(batch * tokens, PARTIALS // (heads * queries * keys)))
    bias_sums = torch.empty(shares, heads, frames, args["k"].shape[1], dtype=torch.float32, device=q.device)
    args |= {"bias_sums": bias_sums, "B": batch, "P": shares}
    programs = shares * heads * queries * keys
    return [*launches, _launch(temporal_attention_backward_bias_kernel, programs, args, constexprs, tile)], bias_sums


def _launch(kernel: Any, programs: int, args: dict[str, Any], constexprs: dict[str, Any], tile: Tiles) -> Launch:
    wanted = {name: args[name] for name in kernel.arg_names if name not in constexprs}
    return Launch(kernel, programs, wanted, constexprs, tile.threads)
