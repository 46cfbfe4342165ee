"""Backward of ``frame_attention``: gradients of queries, then of keys and values, each summed by one program in one order."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..temporal_attention.triton_tiles import pointers, read, write
from ..triton_common import Launch, cdiv
from .triton_tiles import (
    EXTRA,
    SIZES,
    common,
    first_rows,
    frame_of,
    frames_seen,
    next_rows,
    of_program,
    start_of,
    tiles,
    within,
)


@triton.jit
def probabilities(b_s, b_lse, m, scale):
    """Products of queries and keys to probabilities; b_lse like them."""
    return tl.where(m, tl.exp2(b_s * (scale * 1.4426950408889634) - b_lse * 1.4426950408889634), 0.0)


@triton.jit
def from_keys(b_q, b_g, b_k, b_v, m_k, b_lse, b_delta, scale, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """What a tile of keys adds to the gradient of the queries."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BQ, BK]
    b_p = probabilities(b_s, b_lse[:, None], m_k[None, :], scale)
    b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    b_ds = tl.where(m_k[None, :], b_p * (b_dp - b_delta[:, None]) * scale, 0.0)
    return tl.dot(b_ds.to(DOT), b_k, input_precision=PRECISION)


@triton.jit
def no_infinity(b_x):
    """Of a log-sum-exp, or what is like it: an infinite one is no sum, for scores of infinity have no softmax."""
    return tl.where(b_x == float("inf"), float("nan"), b_x)


@triton.jit(do_not_specialize=SIZES + EXTRA)
def frame_attention_queries_kernel(
    g, q, k, v, ek, ev, mask, o, lse,
    delta,  # [B, T, LQ, heads] fp32: <g, o>, for the other kernel
    dq,
    T, LQ, L, M, heads, FIRST, LAST, scale,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_ekb, s_ekt, s_ekn, s_ekh,
    s_evb, s_evt, s_evn, s_evh,
    s_ob, s_ot, s_on, s_oh,
    s_lb, s_lt, s_ln, s_lh,
    s_dqb, s_dqt, s_dqn, s_dqh,
    OFFSETS: tl.constexpr, EDGES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b, i_t, i_h, o_q = of_program(LQ, T, heads, BQ)
    m_q = o_q < LQ
    b_q = read(pointers(q, i_b, i_h, i_t, o_q, s_qb, s_qt, s_qn, s_qh, BD, UNIT), m_q, D, BD, DOT)  # [BQ, BD]
    b_g = read(pointers(g, i_b, i_h, i_t, o_q, s_gb, s_gt, s_gn, s_gh, BD, UNIT), m_q, D, BD, DOT)
    b_o = read(pointers(o, i_b, i_h, i_t, o_q, s_ob, s_ot, s_on, s_oh, BD, UNIT), m_q, D, BD, DOT)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    o_sum = i_b.to(tl.int64) * s_lb + i_h.to(tl.int64) * s_lh + i_t.to(tl.int64) * s_lt + o_q.to(tl.int64) * s_ln
    b_lse = no_infinity(tl.load(lse + o_sum, mask=m_q, other=0.0))
    tl.store(delta + o_sum, b_delta, mask=m_q)
    b_dq = tl.zeros([BQ, BD], dtype=tl.float32)
    i_f, n_f = frames_seen(i_t, T, FIRST, LAST, OFFSETS, EDGES)
    n_k = n_f * L
    p_k = start_of(k, i_b, i_h, s_kb, s_kh, UNIT)
    p_v = start_of(v, i_b, i_h, s_vb, s_vh, UNIT)
    o_f, o_n = first_rows(BK, L)
    for _ in tl.range(0, n_k, BK):
        o_s, m_k = frame_of(o_f, i_t, i_f, T, OFFSETS, EDGES)
        m_k = m_k & (o_f < n_f)
        if mask is not None:
            m_k = m_k & (tl.load(mask + i_b.to(tl.int64) * T + o_s, mask=m_k, other=0) != 0)
        b_k = read(within(p_k, o_s, o_n, s_kt, s_kn, BD, UNIT, WIDE), m_k, D, BD, DOT)  # [BK, BD]
        b_v = read(within(p_v, o_s, o_n, s_vt, s_vn, BD, UNIT, WIDE), m_k, D, BD, DOT)
        o_f, o_n = next_rows(o_f, o_n, L, BK, SHORT)
        b_dq += from_keys(b_q, b_g, b_k, b_v, m_k, b_lse, b_delta, scale, DOT, PRECISION)
    if ek is not None:
        for i_k in tl.range(0, M, BE):
            o_k = i_k + tl.arange(0, BE)
            m_k = o_k < M
            b_k = read(pointers(ek, i_b, i_h, i_t, o_k, s_ekb, s_ekt, s_ekn, s_ekh, BD, UNIT), m_k, D, BD, DOT)
            b_v = read(pointers(ev, i_b, i_h, i_t, o_k, s_evb, s_evt, s_evn, s_evh, BD, UNIT), m_k, D, BD, DOT)
            b_dq += from_keys(b_q, b_g, b_k, b_v, m_k, b_lse, b_delta, scale, DOT, PRECISION)
    write(pointers(dq, i_b, i_h, i_t, o_q, s_dqb, s_dqt, s_dqn, s_dqh, BD, UNIT), b_dq, m_q, D, BD)


@triton.jit
def readers(i_s, i_o, T, FIRST, LAST, OFFSETS: tl.constexpr, EDGES: tl.constexpr):
    """The first of the frames whose queries see frame i_s, and how many, which follow each other: by their i_o-th offset, or
    by all of a window.
    """
    if OFFSETS is not None:
        o_t = i_s - OFFSETS[0]
        for i in tl.static_range(1, len(OFFSETS)):
            o_t = tl.where(i_o == i, i_s - OFFSETS[i], o_t)
        i_first = o_t
        i_last = o_t
    elif EDGES == "clamp":
        i_first = i_s - FIRST - i_o
        i_last = i_first
    else:
        i_first = i_s - LAST
        i_last = i_s - FIRST
    if EDGES == "clamp":  # the clip's first and last frame are read for all that lies beyond
        i_first = tl.where(i_s == 0, 0, i_first)
        i_last = tl.where(i_s == T - 1, T - 1, i_last)
    i_first = tl.maximum(i_first, 0)
    return i_first, tl.maximum(tl.minimum(i_last, T - 1) - i_first + 1, 0)


@triton.jit(do_not_specialize=[*SIZES, "s_kb", "s_kt", "s_vb", "s_vt"])
def frame_attention_keys_kernel(
    g, q, k, v, mask, lse, delta, dk, dv,
    T, LQ, L, heads, FIRST, LAST, scale,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_lb, s_lt, s_ln, s_lh,
    s_dkb, s_dkt, s_dkn, s_dkh,
    s_dvb, s_dvt, s_dvn, s_dvh,
    OFFSETS: tl.constexpr, EDGES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A block of keys of a frame and a head: the queries of all frames that see it, one frame after the other."""
    i_b, i_s, i_h, o_k = of_program(L, T, heads, BK)
    m_k = o_k < L
    b_k = read(pointers(k, i_b, i_h, i_s, o_k, s_kb, s_kt, s_kn, s_kh, BD, UNIT), m_k, D, BD, DOT)  # [BK, BD]
    b_v = read(pointers(v, i_b, i_h, i_s, o_k, s_vb, s_vt, s_vn, s_vh, BD, UNIT), m_k, D, BD, DOT)
    p_q = start_of(q, i_b, i_h, s_qb, s_qh, UNIT)
    p_g = start_of(g, i_b, i_h, s_gb, s_gh, UNIT)
    p_lse = start_of(lse, i_b, i_h, s_lb, s_lh, 1)
    p_delta = start_of(delta, i_b, i_h, s_lb, s_lh, 1)
    b_dk = tl.zeros([BK, BD], dtype=tl.float32)
    b_dv = tl.zeros([BK, BD], dtype=tl.float32)
    if OFFSETS is not None:
        n_o = len(OFFSETS)
    elif EDGES == "clamp":
        n_o = LAST - FIRST + 1
    else:
        n_o = 1
    for i_o in range(n_o):
        i_f, n_f = readers(i_s, i_o, T, FIRST, LAST, OFFSETS, EDGES)
        if mask is not None:
            n_f = tl.where(tl.load(mask + i_b.to(tl.int64) * T + i_s) != 0, n_f, 0)
        o_f, o_q = first_rows(BQ, LQ)
        for _ in tl.range(0, n_f * LQ, BQ):
            m_q = o_f < n_f
            o_t = i_f + o_f
            b_q = read(within(p_q, o_t, o_q, s_qt, s_qn, BD, UNIT, WIDE), m_q, D, BD, DOT)  # [BQ, BD]
            b_g = read(within(p_g, o_t, o_q, s_gt, s_gn, BD, UNIT, WIDE), m_q, D, BD, DOT)
            b_lse = no_infinity(tl.load(p_lse + o_t * s_lt + o_q * s_ln, mask=m_q, other=0.0))
            b_delta = no_infinity(tl.load(p_delta + o_t * s_lt + o_q * s_ln, mask=m_q, other=0.0))
            o_f, o_q = next_rows(o_f, o_q, LQ, BQ, SHORT)
            m_s = m_k[:, None] & m_q[None, :]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BK, BQ]
            b_p = probabilities(b_s, b_lse[None, :], m_s, scale)
            b_dv += tl.dot(b_p.to(DOT), b_g, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
            b_ds = tl.where(m_s, b_p * (b_dp - b_delta[None, :]) * scale, 0.0)
            b_dk += tl.dot(b_ds.to(DOT), b_q, input_precision=PRECISION)
    write(pointers(dk, i_b, i_h, i_s, o_k, s_dkb, s_dkt, s_dkn, s_dkh, BD, UNIT), b_dk, m_k, D, BD)
    write(pointers(dv, i_b, i_h, i_s, o_k, s_dvb, s_dvt, s_dvn, s_dvh, BD, UNIT), b_dv, m_k, D, BD)


def plan_queries(heads: dict[str, Any], mask: Tensor | None, offsets: tuple[int, ...], edges: str, scale: float) -> Launch:
    """Of heads that see the same frames: writes dq, and delta for the launch that follows."""
    q, k, ek = heads["q"], heads["k"], heads["ek"]
    tile = tiles(q, "queries")
    names = ("g", "q", "k", "v", "ek", "ev", "o", "l", "d", "dq")
    args, constexprs = common({name: heads[name] for name in names}, mask, offsets, edges, scale)
    args |= {"lse": args.pop("l"), "delta": args.pop("d")}
    keys, extra = min(len(offsets) or q.shape[1], q.shape[1]) * k.shape[2], 0 if ek is None else ek.shape[2]
    constexprs |= {"SHORT": k.shape[2] < tile.keys, "BQ": tile.rows, "BK": tile.keys, "BE": 16, "BD": tile.BD}
    programs = q.shape[0] * q.shape[1] * q.shape[3] * cdiv(q.shape[2], tile.rows)
    loops = (cdiv(keys, tile.keys), *([cdiv(extra, 16)] if extra else []))
    return Launch(frame_attention_queries_kernel, programs, args, constexprs, tile.threads, tile.stages, loops=loops)


def plan_keys(heads: dict[str, Any], mask: Tensor | None, offsets: tuple[int, ...], edges: str, scale: float) -> Launch:
    """Of heads that see the same frames: writes dk and dv."""
    q, k = heads["q"], heads["k"]
    tile = tiles(q, "keys")
    names = ("g", "q", "k", "v", "l", "d", "dk", "dv")
    args, constexprs = common({name: heads[name] for name in names}, mask, offsets, edges, scale)
    args |= {"lse": args.pop("l"), "delta": args.pop("d")}
    del args["M"]
    few, rows = 16 if k.shape[2] <= 16 else tile.keys, tile.rows
    constexprs |= {"SHORT": q.shape[2] < rows, "BQ": rows, "BK": few, "BD": tile.BD}
    programs = q.shape[0] * q.shape[1] * q.shape[3] * cdiv(k.shape[2], few)
    one_by_one = bool(offsets) and (constexprs["OFFSETS"] is not None or edges == "clamp")
    queries = q.shape[2] * (1 if one_by_one else min(len(offsets) or q.shape[1], q.shape[1]))
    loops = (cdiv(queries, rows), *([len(offsets)] if one_by_one else []))
    return Launch(frame_attention_keys_kernel, programs, args, constexprs, tile.threads, tile.stages, loops=loops)
