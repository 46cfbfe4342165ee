"""Triton kernels of ``video_cross_attention`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..temporal_attention.triton_tiles import ONE_WARP, pointers, read, strides, write
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run
from . import reference
from .op import empty_grads, empty_output
from .triton_tiles import any_valid, as_one_frame, constants, exp, mixed, outer, row_products, tiles

JOINED = 16  # pieces that are added at a time


@triton.jit
def video_cross_attention_kernel(
    q, k, v, mask,
    most, total,  # [B, S, Q, H] fp32: of each piece the largest score, and the sum of exp(score - it)
    values,  # [B, S, Q, H, D] fp32: the sums of values
    Q, T, N, H, scale,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    TILES: tl.constexpr,  # of a piece
):  # fmt: skip
    """A piece: TILES tiles of BK tokens of one frame, for BQ queries of one head."""
    n_p = tl.cdiv(N, BK * TILES)
    n_q = tl.cdiv(Q, BQ)
    i_h = tl.program_id(0) % H
    i_q = tl.program_id(0) // H % n_q
    i_u = tl.program_id(0) // H // n_q  # clip and piece
    i_p = i_u % n_p
    i_t = i_u // n_p % T
    i_b = i_u // n_p // T
    o_i = i_q * BQ + tl.arange(0, BQ)
    m_q = o_i < Q
    b_q = read(pointers(q, i_b, i_h, o_i, o_i * 0, s_qb, s_qt, s_qn, s_qh, BD, UNIT), m_q, D, BD, DOT)  # [BQ, BD]
    b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BQ], dtype=tl.float32)
    b_o = tl.zeros([BQ, BD], dtype=tl.float32)
    for i in range(TILES):
        o_n = (i_p * TILES + i) * BK + tl.arange(0, BK)
        m_k = o_n < N
        b_k = read(pointers(k, i_b, i_h, i_t, o_n, s_kb, s_kt, s_kn, s_kh, BD, UNIT), m_k, D, BD, DOT)  # [BK, BD]
        b_v = read(pointers(v, i_b, i_h, i_t, o_n, s_vb, s_vt, s_vn, s_vh, BD, UNIT), m_k, D, BD, DOT)
        if mask is not None:
            m_k = m_k & (tl.load(mask + i_b.to(tl.int64) * T + i_t) != 0)
        b_s = tl.where(m_k[None, :], row_products(b_q, b_k, BQ, PRECISION) * scale, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = exp(b_s - b_safe[:, None])
        b_alpha = exp(b_m - b_safe)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_o = b_o * b_alpha[:, None] + mixed(b_p, b_v, BQ, DOT, PRECISION)
        b_m = b_new
    o_row = (i_u.to(tl.int64) * Q + o_i) * H + i_h
    tl.store(most + o_row, b_m, mask=m_q)
    tl.store(total + o_row, b_l, mask=m_q)
    write(values + o_row[:, None] * D + tl.arange(0, BD)[None, :], b_o, m_q, D, BD)


@triton.jit
def video_cross_attention_join_kernel(
    most, total, values, mask, o,
    sums,  # [B, Q, H, 2] fp32: the same two of all pieces
    Q, T, H, S,
    s_ob, s_ot, s_on, s_oh,
    D: tl.constexpr, UNIT: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """The S pieces of one query of one head, in their order."""
    i_h = tl.program_id(0) % H
    i_q = tl.program_id(0) // H % Q
    i_b = tl.program_id(0) // H // Q
    o_d = tl.arange(0, BD)
    b_m = tl.full([1], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([1], dtype=tl.float32)
    b_o = tl.zeros([1, BD], dtype=tl.float32)
    for i_s in range(tl.cdiv(S, BS)):
        o_s = i_s * BS + tl.arange(0, BS)
        m_s = o_s < S
        o_row = ((i_b.to(tl.int64) * S + o_s) * Q + i_q) * H + i_h
        b_ms = tl.load(most + o_row, mask=m_s, other=float("-inf"))
        b_ls = tl.load(total + o_row, mask=m_s, other=0.0)
        b_v = tl.load(values + o_row[:, None] * D + o_d[None, :], mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
        b_new = tl.maximum(b_m, tl.max(b_ms, 0))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_alpha = exp(b_m - b_safe)
        b_w = exp(b_ms - b_safe)
        b_l = b_l * b_alpha + tl.sum(b_w * b_ls, 0)
        b_o = b_o * b_alpha[:, None] + tl.sum(b_w[:, None] * b_v, 0)[None, :]
        b_m = b_new
    if mask is not None:
        b_l = tl.where(any_valid(mask, i_b, T, TP), b_l, 1.0)
    p_sums = sums + ((i_b.to(tl.int64) * Q + i_q) * H + i_h) * 2 + tl.arange(0, 1)
    tl.store(p_sums, b_m)
    tl.store(p_sums + 1, b_l)
    o_i = i_q + tl.arange(0, 1)
    p_o = pointers(o, i_b, i_h, o_i, o_i * 0, s_ob, s_ot, s_on, s_oh, BD, UNIT)
    write(p_o, b_o * (1.0 / b_l)[:, None], o_i < Q, D, BD)


@triton.jit
def video_cross_attention_backward_kernel(
    g, q, k, v, mask, o,
    sums,  # [B, Q, H, 2] fp32
    dk, dv,  # each may be None
    parts,  # [B, S, Q, H, D] fp32: of each piece dq, or None
    Q, T, N, H, scale,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_ob, s_ot, s_on, s_oh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_dkb, s_dkt, s_dkn, s_dkh,
    s_dvb, s_dvt, s_dvn, s_dvh,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    NQ: tl.constexpr,  # whether all queries are one block
    TP: tl.constexpr,
):  # fmt: skip
    """A tile of BK tokens of one frame and head: their gradients, and what they add to that of each query."""
    n_p = tl.cdiv(N, BK)
    i_h = tl.program_id(0) % H
    i_u = tl.program_id(0) // H  # clip and piece
    i_t = i_u // n_p % T
    i_b = i_u // n_p // T
    o_n = i_u % n_p * BK + tl.arange(0, BK)
    m_n = o_n < N
    b_k = read(pointers(k, i_b, i_h, i_t, o_n, s_kb, s_kt, s_kn, s_kh, BD, UNIT), m_n, D, BD, DOT)  # [BK, BD]
    b_v = read(pointers(v, i_b, i_h, i_t, o_n, s_vb, s_vt, s_vn, s_vh, BD, UNIT), m_n, D, BD, DOT)
    m_k = m_n
    if mask is not None:
        m_k = m_n & (tl.load(mask + i_b.to(tl.int64) * T + i_t) != 0)
        any_key = any_valid(mask, i_b, T, TP)
    b_dk = tl.zeros([BK, BD], dtype=tl.float32)
    b_dv = tl.zeros([BK, BD], dtype=tl.float32)
    for i_q in range(1 if NQ else tl.cdiv(Q, BQ)):
        o_i = i_q * BQ + tl.arange(0, BQ)
        m_q = o_i < Q
        b_q = read(pointers(q, i_b, i_h, o_i, o_i * 0, s_qb, s_qt, s_qn, s_qh, BD, UNIT), m_q, D, BD, DOT)  # [BQ, BD]
        b_g = read(pointers(g, i_b, i_h, o_i, o_i * 0, s_gb, s_gt, s_gn, s_gh, BD, UNIT), m_q, D, BD, DOT)
        b_o = read(pointers(o, i_b, i_h, o_i, o_i * 0, s_ob, s_ot, s_on, s_oh, BD, UNIT), m_q, D, BD, DOT)
        p_sums = sums + ((i_b.to(tl.int64) * Q + o_i) * H + i_h) * 2
        b_m = tl.load(p_sums, mask=m_q, other=0.0)
        b_l = tl.load(p_sums + 1, mask=m_q, other=1.0)
        if mask is not None:
            b_m = tl.where(any_key, b_m, float("inf"))  # so that no key has a probability
        b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
        b_s = tl.where(m_k[None, :], row_products(b_q, b_k, BQ, PRECISION) * scale, float("-inf"))
        b_p = exp(b_s - b_m[:, None]) * (1.0 / b_l)[:, None]  # [BQ, BK]
        b_p = tl.where(m_q[:, None] & m_n[None, :], b_p, 0.0)
        b_dp = row_products(b_g, b_v, BQ, PRECISION)
        b_ds = tl.where(m_q[:, None] & m_k[None, :], b_p * (b_dp - b_delta[:, None]), 0.0) * scale
        if dv is not None:
            b_dv += outer(b_p, b_g, BQ, DOT, PRECISION)
        if dk is not None:
            b_dk += outer(b_ds, b_q, BQ, DOT, PRECISION)
        if parts is not None:
            o_row = (i_u.to(tl.int64) * Q + o_i) * H + i_h
            p_parts = parts + o_row[:, None] * D + tl.arange(0, BD)[None, :]
            write(p_parts, mixed(b_ds, b_k, BQ, DOT, PRECISION), m_q, D, BD)
    if dv is not None:
        write(pointers(dv, i_b, i_h, i_t, o_n, s_dvb, s_dvt, s_dvn, s_dvh, BD, UNIT), b_dv, m_n, D, BD)
    if dk is not None:
        write(pointers(dk, i_b, i_h, i_t, o_n, s_dkb, s_dkt, s_dkn, s_dkh, BD, UNIT), b_dk, m_n, D, BD)


@triton.jit
def video_cross_attention_add_kernel(
    parts, dq, Q, H, S,
    s_dqb, s_dqt, s_dqn, s_dqh,
    D: tl.constexpr, UNIT: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dq of one query of one head: the sums of the S pieces in their order."""
    i_h = tl.program_id(0) % H
    i_q = tl.program_id(0) // H % Q
    i_b = tl.program_id(0) // H // Q
    o_d = tl.arange(0, BD)
    b_dq = tl.zeros([1, BD], dtype=tl.float32)
    for i_s in range(tl.cdiv(S, BS)):
        o_s = i_s * BS + tl.arange(0, BS)
        o_row = ((i_b.to(tl.int64) * S + o_s) * Q + i_q) * H + i_h
        m_s = (o_s < S)[:, None] & (o_d < D)[None, :]
        b_dq += tl.sum(tl.load(parts + o_row[:, None] * D + o_d[None, :], mask=m_s, other=0.0), 0)[None, :]
    o_i = i_q + tl.arange(0, 1)
    write(pointers(dq, i_b, i_h, o_i, o_i * 0, s_dqb, s_dqt, s_dqn, s_dqh, BD, UNIT), b_dq, o_i < Q, D, BD)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def plan(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor, scale: float) -> list[Launch]:
    """The launches that write out and sums."""
    k, v = as_one_frame(mask, k, v)
    (batch, queries, heads, dim), (_, frames, tokens, _, _) = q.shape, k.shape
    tile = tiles(queries, tokens, dim, q.element_size(), backward=False)
    pieces = frames * cdiv(tokens, tile.BK * tile.TILES)
    most = torch.empty(batch, pieces, queries, heads, dtype=torch.float32, device=q.device)
    total = torch.empty_like(most)
    values = torch.empty(batch, pieces, queries, heads, dim, dtype=torch.float32, device=q.device)
    steps, unit = strides(q=q[:, :, None], k=k, v=v)
    sizes = {"Q": queries, "T": frames, "N": tokens, "H": heads, "scale": float(scale)}
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": _bytes(mask), **sizes, **steps}
    args |= {"most": most, "total": total, "values": values}
    constexprs = {**constants(q, tile), "UNIT": unit, "TILES": tile.TILES}
    programs = batch * pieces * cdiv(queries, tile.BQ) * heads
    loops = (tile.TILES,) if tile.TILES > 1 else ()
    steps, unit = strides(o=out[:, :, None])
    join: dict[str, Any] = {"most": most, "total": total, "values": values, "mask": _bytes(mask), "o": out, "sums": sums}
    join |= {"Q": queries, "T": frames, "H": heads, "S": pieces, **steps}
    of_join = {"D": dim, "UNIT": unit, "BD": tile.BD, "BS": JOINED, "TP": pow2(frames) if mask is not None else 1}
    return [
        Launch(video_cross_attention_kernel, programs, args, constexprs, tile.threads, loops=loops),
        Launch(
            video_cross_attention_join_kernel, batch * queries * heads, join, of_join, ONE_WARP,
            loops=(cdiv(pieces, JOINED),),
        ),
    ]  # fmt: skip


def plan_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, sums: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, scale: float,
) -> list[Launch]:  # fmt: skip
    """The launches that write those of the gradients that are given."""
    k, v, dk, dv = as_one_frame(mask, k, v, dk, dv)
    (batch, queries, heads, dim), (_, frames, tokens, _, _) = q.shape, k.shape
    tile = tiles(queries, tokens, dim, q.element_size(), backward=True)
    pieces = frames * cdiv(tokens, tile.BK)
    parts = None
    if dq is not None:
        parts = torch.empty(batch, pieces, queries, heads, dim, dtype=torch.float32, device=q.device)
    absent = torch.empty(1, 1, 1, 1, 1, device="meta")
    rows = {"g": g[:, :, None], "q": q[:, :, None], "o": out[:, :, None]}
    steps, unit = strides(**rows, k=k, v=v, dk=absent if dk is None else dk, dv=absent if dv is None else dv)
    args: dict[str, Any] = {"g": g, "q": q, "k": k, "v": v, "mask": _bytes(mask), "o": out, "sums": sums}
    args |= {"dk": dk, "dv": dv, "parts": parts}
    args |= {"Q": queries, "T": frames, "N": tokens, "H": heads, "scale": float(scale), **steps}
    blocks = cdiv(queries, tile.BQ)
    constexprs = {**constants(q, tile), "UNIT": unit, "NQ": blocks == 1, "TP": pow2(frames) if mask is not None else 1}
    launches = [
        Launch(
            video_cross_attention_backward_kernel, batch * pieces * heads, args, constexprs, tile.threads,
            loops=(blocks,) if blocks > 1 else (),
        )
    ]  # fmt: skip
    if dq is not None:
        steps, unit = strides(dq=dq[:, :, None])
        args = {"parts": parts, "dq": dq, "Q": queries, "H": heads, "S": pieces, **steps}
        constexprs = {"D": dim, "UNIT": unit, "BD": tile.BD, "BS": JOINED}
        launches.append(
            Launch(
                video_cross_attention_add_kernel, batch * queries * heads, args, constexprs, ONE_WARP,
                loops=(cdiv(pieces, JOINED),),
            )
        )  # fmt: skip
    return launches


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, sums = empty_output(q)
    if q.numel() > 0 and k.numel() > 0:
        run(plan, (q, k, v, mask, out, sums), (scale,))
    elif sums.numel() > 0:  # no channels, or no tokens
        for into, found in zip((out, sums), reference.forward(q, k, v, mask, scale)):
            into.copy_(found)
    return out, sums


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, sums: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = empty_grads(grad, q, k, v, wanted)
    if q.numel() == 0 or k.numel() == 0:
        for x in grads:
            x.zero_()
    elif any(wanted):
        into = (x if want else None for x, want in zip(grads, wanted))
        run(plan_backward, (grad, q, k, v, mask, out, sums, *into), (scale,))
    return grads


def _meta(queries: int, frames: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads = 768 // dim if 768 % dim == 0 else 16
    keys = torch.empty(8, frames, 197, heads, dim, dtype=dtype, device="meta")
    return torch.empty(8, queries, heads, dim, dtype=dtype, device="meta"), keys, torch.empty_like(keys)


def _launches(queries: int, dim: int, extras: str, backward: bool, dtype: torch.dtype) -> list[Launch]:
    q, k, v = _meta(queries, 8, dim, dtype)
    if "sequence first" in extras:
        k, v = (torch.empty(197, 8, 8, *k.shape[3:], dtype=dtype, device="meta").permute(1, 2, 0, 3, 4) for _ in range(2))
    mask = torch.empty(8, 8, dtype=torch.bool, device="meta") if "mask" in extras else None
    sums = torch.empty(*q.shape[:3], 2, device="meta")
    if not backward:
        return plan(q, k, v, mask, q, sums, 1.0)
    dk, dv = (None, None) if "dq alone" in extras else (torch.empty_like(k), torch.empty_like(v))
    return plan_backward(q, q, k, v, mask, q, sums, torch.empty_like(q), dk, dv, 1.0)


def _entries(queries: int, dim: int, extras: str = "", backward: bool = True) -> list[Entry]:
    def entry(backward: bool) -> Entry:
        name = f"video_cross_attention {'backward ' if backward else ''}Q{queries} D{dim} {extras}".strip()
        launch = partial(_launches, queries, dim, extras, backward)
        return Entry(name, lambda dtype: launch(dtype)[0], dots=queries > 1)

    return [entry(way) for way in ((False, True) if backward else (False,))]


def _ones(backward: bool, dtype: torch.dtype) -> Launch:
    q, k = torch.empty(1, 1, 1, 1, dtype=dtype, device="meta"), torch.empty(1, 1, 1, 1, 1, dtype=dtype, device="meta")
    sums = torch.empty(1, 1, 1, 2, device="meta")
    if backward:
        return plan_backward(q, q, k, k, None, q, sums, q, k, k, 1.0)[0]
    return plan(q, k, k, None, q, sums, 1.0)[0]


AOT = [
    *_entries(1, 64, "mask, sequence first"),
    *_entries(1, 64, "dq alone"),
    *_entries(1, 32),
    *_entries(1, 72),
    *_entries(1, 80),
    *_entries(1, 88),
    *_entries(1, 128),
    *_entries(1, 256),
    *_entries(8, 72),
    *_entries(8, 64, "mask"),
    *_entries(8, 128),
    *_entries(100, 64),
    *_entries(100, 128),
    *_entries(100, 256),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("video_cross_attention, all sizes 1", partial(_ones, False), (torch.bfloat16,), False, False),
    Entry("video_cross_attention backward, all sizes 1", partial(_ones, True), (torch.bfloat16,), False, False),
]
