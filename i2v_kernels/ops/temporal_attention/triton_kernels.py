"""Triton kernels of ``temporal_attention`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..token_shift import triton_kernels as token_shift
from ..triton_common import Entry, Launch
from ..triton_launch import run
from . import reference
from .packing import empty_grads, empty_output, unpacked
from .triton_long import plan_long_backward
from .triton_tiles import (
    Tiles,
    any_infinite,
    common,
    constants,
    dot_within,
    frames_of,
    pointers,
    read,
    read_from,
    rows,
    scores,
    strides,
    tiles,
    to_frames,
    units,
    valid_keys,
    write,
    write_within,
)

PARTIALS = 1280  # programs that share the sums of the bias' gradient: those that an H100 holds at a time


@triton.jit
def temporal_attention_kernel(
    q, k, v, bias, mask, o,
    lse,  # [B, TQ, N, H] fp32 or None
    TQ, TK, N, H, scale, LEFT, RIGHT,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_ob, s_ot, s_on, s_oh,
    OFFSETS: tl.constexpr, HEADS: tl.constexpr,  # of the heads, as many
    DOT: tl.constexpr,  # dtype of the operands of products
    PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
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
    m_q = (i_n * S + o_jq < N) & (o_t < TQ)
    b_q = read(pointers(q, i_b, i_h, o_t, i_n * S + o_jq, s_qb, s_qt, s_qn, s_qh, BD, UNIT), m_q, D, BD, DOT)  # [BQ, BD]

    b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)  # largest score so far
    b_l = tl.zeros([BQ], dtype=tl.float32)
    b_any = tl.zeros([BQ], dtype=tl.int32)  # whether the query may look at anything
    b_o = tl.zeros([BQ, BD], dtype=tl.float32)
    for i_k in range(n_k):
        o_jk, o_s = rows(i_k, BK, TP)
        o_n = i_n * S + o_jk
        o_f = frames_of(o_s, i_h, TK, OFFSETS, HEADS)
        m_k = (o_n < N) & (o_s < TK)
        p_v = pointers(v, i_b, i_h, o_f, o_n, s_vb, s_vt, s_vn, s_vh, BD, UNIT)
        b_k = read(pointers(k, i_b, i_h, o_f, o_n, s_kb, s_kt, s_kn, s_kh, BD, UNIT), m_k, D, BD, DOT)  # [BK, BD]
        b_v = read(p_v, m_k, D, BD, DOT)
        _, m_valid = valid_keys(o_jq, o_t, o_jk, o_s, o_f, mask, i_b, TQ, TK, LEFT, RIGHT)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BQ, BK]
        b_s = scores(b_qk, bias, i_h, o_t, o_s, m_valid, scale, TQ, TK)
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        if mask is not None or LEFT is not None or RIGHT is not None:
            b_any = tl.maximum(b_any, tl.max(m_valid.to(tl.int32), 1))
        if n_k == 1:
            b_l = tl.sum(b_p, 1)
            b_o = dot_within(b_p.to(DOT), b_v, p_v, m_k, o_jk, D, S, BD, DOT, PRECISION)
        else:
            b_alpha = tl.exp2(b_m - b_safe)
            b_l = b_l * b_alpha + tl.sum(b_p, 1)
            b_o = b_o * b_alpha[:, None] + tl.dot(b_p.to(DOT), b_v, input_precision=PRECISION)
        b_m = b_new
    if lse is not None:
        o_lse = ((i_b.to(tl.int64) * TQ + o_t) * N + i_n * S + o_jq) * H + i_h
        b_lse = tl.where(b_m == float("inf"), b_m, (b_m + tl.log2(b_l)) * 0.6931471805599453)
        tl.store(lse + o_lse, b_lse, mask=m_q)
    if mask is not None or LEFT is not None or RIGHT is not None:
        b_l = tl.where(b_any > 0, b_l, 1.0)
    p_o = pointers(o, i_b, i_h, o_t, i_n * S + o_jq, s_ob, s_ot, s_on, s_oh, BD, UNIT)
    write(p_o, b_o * (1.0 / b_l)[:, None], m_q, D, BD)


@triton.jit(do_not_specialize=["B", "P"])
def temporal_attention_backward_kernel(
    g, q, k, v, bias, mask, dq, dk, dv,
    bias_sums,  # [P * S, H, TQ, TK] fp32
    TQ, TK, N, H, scale, LEFT, RIGHT,
    s_gb, s_gt, s_gn, s_gh,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_dqb, s_dqt, s_dqn, s_dqh,
    s_dkb, s_dkt, s_dkn, s_dkh,
    s_dvb, s_dvt, s_dvn, s_dvh,
    B, P,
    OFFSETS: tl.constexpr, HEADS: tl.constexpr,  # of the heads, as many
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, UNIT: tl.constexpr, TP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Whole sequences in a tile. With bias_sums a program takes every P-th tile, else one (P is their number)."""
    S: tl.constexpr = BQ // TP
    n_n = tl.cdiv(N, S)
    i_h = tl.program_id(0) % H
    i_p = tl.program_id(0) // H
    o_j, o_r = rows(0, BQ, TP)
    b_bias = tl.zeros([BQ, BQ], dtype=tl.float32)
    # of one step the compiler makes no loop, before which it would compute all addresses and keep them in registers
    i_end = i_p + 1 if bias_sums is None else B * n_n
    for i_u in tl.range(i_p, i_end, 1 if bias_sums is None else P, disable_licm=bias_sums is not None):
        i_b = tl.cast(i_u // n_n, tl.int64)
        o_n = i_u % n_n * S + o_j
        o_t = o_r
        if bias_sums is not None:
            o_t += tl.minimum(i_u + N, 0)  # zero, but the compiler cannot know it: see above
        o_f = frames_of(o_t, i_h, TK, OFFSETS, HEADS)
        m_q = (o_n < N) & (o_t < TQ)
        m_k = (o_n < N) & (o_t < TK)
        p_g = pointers(g, i_b, i_h, o_t, o_n, s_gb, s_gt, s_gn, s_gh, BD, UNIT)
        p_q = pointers(q, i_b, i_h, o_t, o_n, s_qb, s_qt, s_qn, s_qh, BD, UNIT)
        p_k = pointers(k, i_b, i_h, o_f, o_n, s_kb, s_kt, s_kn, s_kh, BD, UNIT)
        p_v = pointers(v, i_b, i_h, o_f, o_n, s_vb, s_vt, s_vn, s_vh, BD, UNIT)
        b_q = read(p_q, m_q, D, BD, DOT)  # [BQ, BD]
        b_k = read(p_k, m_k, D, BD, DOT)
        b_g = read(p_g, m_q, D, BD, DOT)
        b_v = read(p_v, m_k, D, BD, DOT)
        m_same, m_valid = valid_keys(o_j, o_t, o_j, o_t, o_f, mask, i_b, TQ, TK, LEFT, RIGHT)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BQ, BQ]
        b_s = scores(b_qk, bias, i_h, o_t, o_t, m_valid, scale, TQ, TK)
        b_m = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - tl.where(b_m == float("-inf"), 0.0, b_m)[:, None])
        b_l = tl.sum(b_p, 1)
        if mask is not None or LEFT is not None or RIGHT is not None:
            b_l = tl.where(tl.max(m_valid.to(tl.int32), 1) > 0, b_l, 1.0)
        m_same = m_same & m_q[:, None]
        b_p = tl.where(m_same, b_p * (1.0 / b_l)[:, None], 0.0)
        b_gv = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        b_dp = tl.where(m_same, b_gv, 0.0)
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
        b_ds = tl.where(m_valid & m_q[:, None], b_ds, 0.0)
        if S > 1 or OFFSETS is not None:
            again = any_infinite(b_qk) | any_infinite(b_gv)
        b_p = b_p.to(DOT)
        if bias_sums is not None:
            b_bias += b_ds
        b_ds = (b_ds * scale).to(DOT)
        b_pf, b_dsf, m_f = b_p, b_ds, m_k  # of keys, of frames
        if OFFSETS is not None:
            m_f = m_k & (o_t >= frames_of(0, i_h, TK, OFFSETS, HEADS)) & (o_t <= frames_of(TK - 1, i_h, TK, OFFSETS, HEADS))
            again = again | any_infinite(b_ds)
            m_read = read_from(o_j, o_t, o_f, m_k).to(DOT)
            if again:
                b_pf = to_frames(b_p, m_read, PRECISION)
                b_dsf = to_frames(b_ds, m_read, PRECISION)
            else:
                b_pf = tl.dot(b_p, m_read, input_precision=PRECISION).to(DOT)
                b_dsf = tl.dot(b_ds, m_read, input_precision=PRECISION).to(DOT)
        p_dq = pointers(dq, i_b, i_h, o_t, o_n, s_dqb, s_dqt, s_dqn, s_dqh, BD, UNIT)
        p_dk = pointers(dk, i_b, i_h, o_t, o_n, s_dkb, s_dkt, s_dkn, s_dkh, BD, UNIT)
        p_dv = pointers(dv, i_b, i_h, o_t, o_n, s_dvb, s_dvt, s_dvn, s_dvh, BD, UNIT)
        write(p_dv, tl.dot(tl.trans(b_pf), b_g, input_precision=PRECISION), m_f, D, BD)
        write(p_dq, tl.dot(b_ds, b_k, input_precision=PRECISION), m_q, D, BD)
        write(p_dk, tl.dot(tl.trans(b_dsf), b_q, input_precision=PRECISION), m_f, D, BD)
        if OFFSETS is not None:  # read by nobody
            write(p_dv, tl.zeros([BQ, BD], dtype=tl.float32), m_k & (m_f == 0), D, BD)
            write(p_dk, tl.zeros([BQ, BD], dtype=tl.float32), m_k & (m_f == 0), D, BD)
        if S > 1:  # noqa: SIM102
            if again:
                tl.debug_barrier()
                write_within(p_dv, m_f, tl.trans(b_pf), p_g, m_q, o_j, D, S, BD, DOT, PRECISION)
                write_within(p_dq, m_q, b_ds, p_k, m_k, o_j, D, S, BD, DOT, PRECISION)
                write_within(p_dk, m_f, tl.trans(b_dsf), p_q, m_q, o_j, D, S, BD, DOT, PRECISION)

    if bias_sums is not None:
        p_bias = bias_sums + ((i_p.to(tl.int64) * S + o_j) * H + i_h)[:, None] * TQ * TK + o_r[:, None] * TK + o_r[None, :]
        tl.store(p_bias, b_bias, mask=(o_j[:, None] == o_j[None, :]) & (o_r < TQ)[:, None] & (o_r < TK)[None, :])


@dataclass(frozen=True)
class Call:
    """What the kernels compute but for the tensors of q, k and v."""

    bias: Tensor | None = None
    mask: Tensor | None = None
    offsets: Sequence[int] | None = None
    scale: float = 1.0
    left: int = -1
    right: int = -1

    def arguments(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        return common(q, k, self.bias, self.mask, self.scale, self.left, self.right)

    def constants(self, q: Tensor, tile: Tiles) -> dict[str, Any]:
        return constants(q, self.offsets, tile)


def plan(q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor | None) -> Launch:
    """The launch that writes out, and lse if it is given."""
    tile = tiles(max(q.shape[1], k.shape[1]), q.shape[4], q.element_size(), backward=False)
    steps, unit = strides(q=q, k=k, v=v, o=out)
    args = {"q": q, "k": k, "v": v, "o": out, "lse": lse, **call.arguments(q, k), **steps}
    programs = units(q, tile) * q.shape[3] * tile.blocks
    constexprs = {**call.constants(q, tile), "UNIT": unit}
    return Launch(temporal_attention_kernel, programs, args, constexprs, tile.threads)


def plan_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call, dq: Tensor, dk: Tensor, dv: Tensor, bias_grad: bool
) -> tuple[list[Launch], Tensor | None]:
    """The launches that write dq, dk, dv (for long sequences of the keys as the heads saw them) and, if wanted, sums over
    shares of the tokens of the bias' gradient.
    """
    batch, queries, _, heads, dim = q.shape
    keys = k.shape[1]
    tile = tiles(max(queries, keys), dim, q.element_size(), backward=True)
    steps, unit = strides(g=g, q=q, k=k, v=v, dq=dq, dk=dk, dv=dv)
    args = {"g": g, "q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv, **call.arguments(q, k), **steps}
    constexprs = {**call.constants(q, tile), "UNIT": unit}
    if tile.blocks > 1:
        return plan_long_backward(args, tile, constexprs, bias_grad)
    shares, bias_sums = units(q, tile), None
    if bias_grad:
        shares = max(1, min(shares, PARTIALS // heads))
        bias_sums = torch.empty(shares * tile.tokens, heads, queries, keys, dtype=torch.float32, device=q.device)
    args |= {"bias_sums": bias_sums, "B": batch, "P": shares}
    return [Launch(temporal_attention_backward_kernel, shares * heads, args, constexprs, tile.threads)], bias_sums


def _plan(q: Tensor, k: Any, v: Any, bias: Any, mask: Any, out: Tensor, lse: Tensor | None, *options: Any) -> Launch:
    return plan(*unpacked(q, k, v), Call(bias, mask, *options), out, lse)


def _plan_backward(
    grad: Tensor, q: Tensor, k: Any, v: Any, bias: Any, mask: Any, dq: Tensor, dk: Tensor, dv: Tensor, *options: Any
) -> tuple[list[Launch], Tensor | None]:
    *rest, bias_grad = options
    return plan_backward(grad, *unpacked(q, k, v), Call(bias, mask, *rest), dq, dk, dv, bias_grad)


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int, want_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``[B, T, N, H, D]`` -> the same and ``[B, T, N, H]``."""
    out, lse = empty_output(q, want_lse)
    if out.numel() > 0:
        options = (None if offsets is None else tuple(offsets), scale, left, right)
        run(_plan, (q, k, v, bias, mask, out, lse if want_lse else None), options)
    elif out.shape[-1] == 0:
        return reference.forward(q, k, v, bias, mask, offsets, scale, left, right, want_lse)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    offsets: Sequence[int] | None, scale: float, left: int, right: int, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and bias; the last is empty if it is not wanted."""
    dq, dk, dv, dbias = grads = empty_grads(grad, q, k, v, bias, bias_grad)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dbias.zero_()
    into_q, into_k, into_v = unpacked(dq, dk, dv)
    moved = offsets is not None and tiles(max(q.shape[1], into_k.shape[1]), q.shape[-1], q.element_size(), True).blocks > 1
    seen = (torch.empty_like(into_k), torch.empty_like(into_v)) if moved else (into_k, into_v)
    options = (None if offsets is None else tuple(offsets), scale, left, right, bias_grad)
    (bias_sums,) = run(_plan_backward, (grad, q, k, v, bias, mask, into_q, *seen), options)
    if offsets is not None and moved:
        for x, into in zip(seen, (into_k, into_v)):
            into.copy_(_to_frames(x, offsets))
    if bias_sums is not None:
        dbias.copy_(bias_sums.sum(0))
    return grads


def _to_frames(seen: Tensor, offsets: Sequence[int]) -> Tensor:
    """Gradients of keys ``[B, Tk, N, H, D]`` as the heads saw them, to the frames that they were read from."""
    runs = [(sum(1 for _ in group) * seen.shape[4], -offset) for offset, group in itertools.groupby(offsets)]
    channels, moves = zip(*runs)
    return token_shift.backward(seen.flatten(3), channels, moves, "edge", 0, seen.shape[2], 1, False).view(seen.shape)


def _ones(dtype: torch.dtype, backward: bool) -> Launch:
    q = torch.empty(1, 1, 1, 1, 1, dtype=dtype, device="meta")
    if backward:
        return plan_backward(q, q, q, q, Call(), q, q, q, False)[0][0]
    return plan(q, q, q, Call(), q, None)


def _meta(frames: int, dim: int, dtype: torch.dtype, packed: bool = False, keys: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    heads = 768 // dim if 768 % dim == 0 else 16
    if packed:
        qkv = torch.empty(8, frames, 197, 3, heads, dim, dtype=dtype, device="meta")
        return qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
    q = torch.empty(8, frames, 197, heads, dim, dtype=dtype, device="meta")
    k = torch.empty(8, keys or frames, 197, heads, dim, dtype=dtype, device="meta")
    return q, k, torch.empty_like(k)


def _call(q: Tensor, k: Tensor, extras: str) -> Call:
    heads = q.shape[3]
    bias = torch.empty(heads, q.shape[1], k.shape[1], device="meta") if "bias" in extras else None
    mask = torch.empty(8, k.shape[1], dtype=torch.bool, device="meta") if "mask" in extras else None
    offsets = (-1, 1, *[0] * (heads - 2)) if "offsets" in extras else None
    return Call(bias, mask, offsets, q.shape[4] ** -0.5, right=0 if "causal" in extras else -1)


def _forward_entry(frames: int, dim: int, extras: str = "", keys: int = 0) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        q, k, v = _meta(frames, dim, dtype, "packed" in extras, keys)
        lse = torch.empty(8, frames, 197, q.shape[3], device="meta") if "lse" in extras else None
        return plan(q, k, v, _call(q, k, extras), torch.empty(q.shape, dtype=dtype, device="meta"), lse)

    name = f"temporal_attention T{frames}{f' to {keys}' if keys else ''} D{dim} {extras}"
    return Entry(name.strip(), launch, dots=True)


def _backward_entries(frames: int, dim: int, extras: str = "") -> list[Entry]:
    def launches(dtype: torch.dtype) -> list[Launch]:
        q, k, v = _meta(frames, dim, dtype)
        outs = (torch.empty_like(q) for _ in range(4))
        g, dq, dk, dv = outs
        return plan_backward(g, q, k, v, _call(q, k, extras), dq, dk, dv, "bias" in extras)[0]

    name = f"temporal_attention backward T{frames} D{dim} {extras}".strip()
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
    _forward_entry(8, 64, "packed qkv"),
    _forward_entry(8, 64, "bias mask causal"),
    _forward_entry(8, 64, "offsets lse"),
    _forward_entry(8, 64, keys=4),
    _forward_entry(8, 72),
    _forward_entry(8, 88),
    _forward_entry(16, 64),
    _forward_entry(32, 64),
    _forward_entry(64, 64),
    _forward_entry(128, 128),
    _forward_entry(128, 256),
    *_backward_entries(8, 64),
    *_backward_entries(8, 64, "bias mask causal"),
    *_backward_entries(8, 64, "offsets"),
    *_backward_entries(8, 72),
    *_backward_entries(8, 88),
    *_backward_entries(16, 64),
    *_backward_entries(32, 64),
    *_backward_entries(32, 128),
    *_backward_entries(32, 256),
    *_backward_entries(64, 64),
    *_backward_entries(128, 256, "bias mask causal"),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("temporal_attention, all sizes 1", partial(_ones, backward=False), (torch.bfloat16,), True, False),
    Entry("temporal_attention backward, all sizes 1", partial(_ones, backward=True), (torch.bfloat16,), True, False),
]
