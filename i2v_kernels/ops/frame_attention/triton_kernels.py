"""Triton kernels of ``frame_attention`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import OPS
from ..temporal_attention.packing import empty_output, unpacked
from ..temporal_attention.triton_tiles import pointers, read, write
from ..triton_common import Launch, cdiv
from ..triton_launch import run
from . import reference
from .frames import head_groups
from .triton_backward import plan_keys, plan_queries
from .triton_tiles import (
    EXTRA,
    SIZES,
    common,
    first_rows,
    frame_of,
    frames_outside,
    frames_seen,
    join_keys,
    next_rows,
    of_program,
    start_of,
    tiles,
    within,
)


@triton.jit(do_not_specialize=SIZES + EXTRA)
def frame_attention_kernel(
    q, k, v, ek, ev, mask, o,
    lse,  # [B, T, LQ, heads] fp32
    T, LQ, L, M, heads, FIRST, LAST, scale,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_vb, s_vt, s_vn, s_vh,
    s_ekb, s_ekt, s_ekn, s_ekh,
    s_evb, s_evt, s_evn, s_evh,
    s_ob, s_ot, s_on, s_oh,
    s_lb, s_lt, s_ln, s_lh,
    OFFSETS: tl.constexpr, EDGES: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the operands of products
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, SHORT: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A block of queries of a frame and a head, against the frames that it sees and then its extra keys."""
    i_b, i_t, i_h, o_q = of_program(LQ, T, heads, BQ)
    m_q = o_q < LQ
    b_q = read(pointers(q, i_b, i_h, i_t, o_q, s_qb, s_qt, s_qn, s_qh, BD, UNIT), m_q, D, BD, DOT)  # [BQ, BD]
    b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)  # largest score so far, times log2(e)
    b_l = tl.zeros([BQ], dtype=tl.float32)
    b_o = tl.zeros([BQ, BD], dtype=tl.float32)
    b_any = tl.zeros([BK], dtype=tl.int32)  # whether there is any key
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
        if mask is not None or OFFSETS is not None:
            b_any = b_any | m_k.to(tl.int32)
        b_k = read(within(p_k, o_s, o_n, s_kt, s_kn, BD, UNIT, WIDE), m_k, D, BD, DOT)  # [BK, BD]
        b_v = read(within(p_v, o_s, o_n, s_vt, s_vn, BD, UNIT, WIDE), m_k, D, BD, DOT)
        o_f, o_n = next_rows(o_f, o_n, L, BK, SHORT)
        b_m, b_l, b_o = join_keys(b_q, b_k, b_v, m_k, b_m, b_l, b_o, scale, DOT, PRECISION)
    if mask is not None or OFFSETS is not None:
        n_any = tl.max(b_any, 0)
    else:
        n_any = n_k
    if ek is not None:
        n_any = n_any + M
        for i_k in tl.range(0, M, BE):
            o_k = i_k + tl.arange(0, BE)
            m_k = o_k < M
            b_k = read(pointers(ek, i_b, i_h, i_t, o_k, s_ekb, s_ekt, s_ekn, s_ekh, BD, UNIT), m_k, D, BD, DOT)
            b_v = read(pointers(ev, i_b, i_h, i_t, o_k, s_evb, s_evt, s_evn, s_evh, BD, UNIT), m_k, D, BD, DOT)
            b_m, b_l, b_o = join_keys(b_q, b_k, b_v, m_k, b_m, b_l, b_o, scale, DOT, PRECISION)
    if EDGES == "zero":
        n_zero = frames_outside(i_t, n_f, T, FIRST, LAST, OFFSETS) * L
        n_any = n_any + n_zero
        if n_zero > 0:  # keys of zero, scores of zero
            b_new = tl.where(b_m != b_m, b_m, tl.maximum(b_m, 0.0))
            b_alpha = tl.exp2(b_m - b_new)
            b_l = b_l * b_alpha + n_zero.to(tl.float32) * tl.exp2(-b_new)
            b_o = b_o * b_alpha[:, None]
            b_m = b_new
    b_lse = tl.where(b_m == float("inf"), b_m, (b_m + tl.log2(b_l)) * 0.6931471805599453)
    b_l = tl.where(n_any > 0, b_l, 1.0)  # no key to attend to: zeros, not NaN
    p_lse = lse + i_b.to(tl.int64) * s_lb + i_t.to(tl.int64) * s_lt + o_q.to(tl.int64) * s_ln + i_h * s_lh
    tl.store(p_lse, b_lse, mask=m_q)
    p_o = pointers(o, i_b, i_h, i_t, o_q, s_ob, s_ot, s_on, s_oh, BD, UNIT)
    write(p_o, b_o * (1.0 / b_l)[:, None], m_q, D, BD)


def plan(
    q: Tensor, k: Tensor, v: Tensor, ek: Tensor | None, ev: Tensor | None, mask: Tensor | None, out: Tensor, lse: Tensor,
    offsets: tuple[int, ...], counts: tuple[int, ...], edges: str, scale: float,
) -> list[Launch]:  # fmt: skip
    """The launches that write out and lse: one for heads that see the same frames."""
    launches = []
    for first, last, own in head_groups(offsets, counts, q.shape[3]):
        some = {"q": q, "k": k, "v": v, "ek": ek, "ev": ev, "o": out, "l": lse}
        heads = {name: None if x is None else x[:, :, :, first:last] for name, x in some.items()}
        launches.append(_launch(heads, mask, own, edges, scale))
    return launches


def _launch(heads: dict[str, Any], mask: Tensor | None, offsets: tuple[int, ...], edges: str, scale: float) -> Launch:
    q, k, ek = heads["q"], heads["k"], heads["ek"]
    tile = tiles(q, "forward")
    args, constexprs = common(heads, mask, offsets, edges, scale)
    args["lse"] = args.pop("l")
    frames, keys = q.shape[1], min(len(offsets) or q.shape[1], q.shape[1]) * k.shape[2]
    extra = 0 if ek is None else ek.shape[2]
    constexprs |= {"SHORT": k.shape[2] < tile.keys, "BQ": tile.rows, "BK": tile.keys, "BE": 16, "BD": tile.BD}
    programs = q.shape[0] * frames * q.shape[3] * cdiv(q.shape[2], tile.rows)
    loops = (cdiv(keys, tile.keys), *([cdiv(extra, 16)] if extra else []))
    return Launch(frame_attention_kernel, programs, args, constexprs, tile.threads, tile.stages, loops=loops)


def _plan(q: Tensor, k: Any, v: Any, *rest: Any) -> list[Launch]:
    return plan(*unpacked(q, k, v), *rest)


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, extra_k: Tensor | None, extra_v: Tensor | None, mask: Tensor | None,
    offsets: Sequence[int], counts: Sequence[int], edges: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = empty_output(q, True)
    if out.numel() == 0:
        for into, part in zip((out, lse), reference.forward(q, k, v, extra_k, extra_v, mask, offsets, counts, edges, scale)):
            into.copy_(part)
        return out, lse
    run(_plan, (q, k, v, extra_k, extra_v, mask, out, lse), (tuple(offsets), tuple(counts), edges, scale))
    return out, lse


def _plan_backward(
    grad: Tensor, q: Tensor, k: Any, v: Any, ek: Any, ev: Any, mask: Any, out: Tensor, lse: Tensor, dq: Tensor, dk: Any,
    dv: Any, dek: Any, dev: Any, *options: Any,
) -> list[Launch]:  # fmt: skip
    q, k, v = unpacked(q, k, v)
    offsets, counts, edges, scale = options
    delta = torch.empty_like(lse)
    launches = []
    for first, last, own in head_groups(offsets, counts, q.shape[3]):
        some = {"g": grad, "q": q, "k": k, "v": v, "ek": ek, "ev": ev, "o": out, "l": lse, "d": delta}
        some |= {"dq": dq, "dk": dk, "dv": dv, "dek": dek, "dev": dev}
        heads = {name: None if x is None else x[:, :, :, first:last] for name, x in some.items()}
        launches.append(plan_queries(heads, mask, own, edges, scale))
        if dk is not None:
            launches.append(plan_keys(heads, mask, own, edges, scale))
        if dek is not None:  # the queries of a frame attend to them, and no others: as to the keys of their own frame
            extra = {"k": "ek", "v": "ev", "dk": "dek", "dv": "dev"}
            heads |= {name: heads[of] for name, of in extra.items()}
            launches.append(plan_keys(heads, None, (0,), "mask", scale))
    return launches


def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, offsets, counts, edges, scale, out, lse, _ = args
    memory = OPS["frame_attention"].fake_backward(grad, *args)  # type: ignore[misc]
    if out.numel() == 0:
        return tuple(x.zero_() for x in memory)
    q, k, v, extra_k, extra_v, mask = inputs
    into: list[Any] = [None if x.shape == (0,) else x for x in memory]
    dq, dk, dv = unpacked(*into[:3]) if q.dim() == 6 and into[0] is not None else into[:3]
    dek, dev = into[3:]
    # kernels write gradients of keys and values together
    dq = torch.empty_like(out) if dq is None else dq
    dk, dv = _both(dk, dv, k, v)
    dek, dev = _both(dek, dev, extra_k, extra_v)
    tensors = (grad, q, k, v, extra_k, extra_v, mask, out, lse, dq, dk, dv, dek, dev)
    run(_plan_backward, tensors, (tuple(offsets), tuple(counts), edges, scale))
    return memory


def _both(dk: Tensor | None, dv: Tensor | None, k: Any, v: Any) -> tuple[Tensor | None, Tensor | None]:
    """Memory for both gradients where one is wanted."""
    if dk is None and dv is None:
        return None, None
    return (torch.empty_like(k) if dk is None else dk), (torch.empty_like(v) if dv is None else dv)
