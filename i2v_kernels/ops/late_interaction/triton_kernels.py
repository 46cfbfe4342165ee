"""Triton kernels of ``late_interaction`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import OPS
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run
from .op import begun, empty_output
from .triton_tiles import (
    MOST,
    attention,
    attention_gradient,
    constants,
    largest,
    places,
    rows_of,
    similarities,
    steps,
    tile_of,
    together,
    valid,
)

# Sizes, and strides that the numbers of texts and videos are in: with other numbers nothing is compiled anew.
SIZES = ["A", "V", "Nt", "Nv", "s_sa", "s_sv", "s_ga", "s_gv", "s_xba", "s_xbv", "s_yba", "s_ybv"]


@triton.jit(do_not_specialize=SIZES)
def late_interaction_kernel(
    x, y,  # [A, Nt, D], [V, Nv, D]
    x_weight, y_weight, x_mask, y_mask,
    scores,  # [A, V] fp32
    x_best, y_best,  # [A, V, Nt] and [A, V, Nv], or None
    A, V, Nt, Nv, sharp, half,
    s_xi, s_xt, s_yi, s_yt, s_sa, s_sv, s_xba, s_xbv, s_yba, s_ybv,
    UNIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    NA: tl.constexpr, BT: tl.constexpr, NV: tl.constexpr, BV: tl.constexpr,
    ONE_T: tl.constexpr, ONE_V: tl.constexpr,  # whether a tile holds all tokens
    ACROSS: tl.constexpr,  # y's tokens seek theirs in x too, which ONE_T holds
    ZERO: tl.constexpr, SOFT: tl.constexpr, UNIT_LENGTH: tl.constexpr,
    ADD: tl.constexpr,  # to what the scores are
):  # fmt: skip
    """NA items of x, a block of their tokens after the other, with NV items of y."""
    n_v = tl.cdiv(V, NV)
    i_a = tl.program_id(0) // n_v
    i_v = tl.program_id(0) % n_v
    o_a = (i_a * NA + tl.arange(0, NA)).to(tl.int64)
    o_b = (i_v * NV + tl.arange(0, NV)).to(tl.int64)
    m_s = (o_a < A)[:, None] & (o_b < V)[None, :]
    b_score = tl.zeros([NA, NV], dtype=tl.float32)
    for i_t in range(1 if ONE_T else tl.cdiv(Nt, BT)):
        o_i, o_t, m_r = places(i_a, NA, BT, A, Nt - i_t * BT)
        o_t += i_t * BT
        p_x = rows_of(x, o_i, o_t, s_xi, s_xt, UNIT)
        m_x = valid(x_mask, o_i, o_t, m_r, Nt)
        m_row = tl.reshape(m_r if ZERO else m_x, [NA, BT, 1, 1])
        o_row = tl.reshape(o_t, [NA, BT, 1, 1])
        b_most = tl.full([NA, BT, NV], float("-inf"), dtype=tl.float32)
        b_place = tl.zeros([NA, BT, NV], dtype=tl.int32)
        b_some = tl.zeros([1, 1, NV], dtype=tl.int32)
        for i_n in range(1 if ONE_V else tl.cdiv(Nv, BV)):
            o_j, o_n, m_c = places(i_v, NV, BV, V, Nv - i_n * BV)
            o_n += i_n * BV
            m_y = valid(y_mask, o_j, o_n, m_c, Nv)
            p_y = rows_of(y, o_j, o_n, s_yi, s_yt, UNIT)
            b_s = similarities(p_x, p_y, m_r, m_c, NA * BT, NV * BV, D, BD, DOT, PRECISION)
            if ZERO:
                b_s *= (m_x[:, None] & m_y[None, :]).to(tl.float32)
            b_s = tl.reshape(b_s, [NA, BT, NV, BV])
            m_column = tl.reshape(m_c if ZERO else m_y, [1, 1, NV, BV])
            b_some = tl.maximum(b_some, tl.max(m_column.to(tl.int32), 3))
            if SOFT:
                _, b_most, _ = attention(b_s, m_column, sharp, 3, UNIT_LENGTH)
            else:
                b_new, b_at = largest(b_s, m_column, tl.reshape(o_n, [1, 1, NV, BV]), 3, x_best is not None)
                m_more = ((b_new > b_most) | (b_new != b_new)) & (b_most == b_most)
                b_most = tl.where(m_more, b_new, b_most)
                b_place = tl.where(m_more, b_at, b_place)
            if ACROSS:
                b_w = tl.load(y_weight + o_j.to(tl.int64) * Nv + o_n, mask=m_y, other=0)
                if SOFT:
                    _, b_found, _ = attention(b_s, m_row, sharp, 1, UNIT_LENGTH)
                else:
                    b_found, b_at = largest(b_s, m_row, o_row, 1, y_best is not None)
                    if y_best is not None:
                        o_c = tl.reshape(o_n, [1, NV, BV])
                        p_best = y_best + o_a[:, None, None] * s_yba + o_b[None, :, None] * s_ybv + o_c
                        tl.store(p_best, b_at.to(y_best.dtype.element_ty), mask=m_s[:, :, None] & (o_c < Nv))
                m_found = (tl.max(m_row.to(tl.int32), 1) > 0) & tl.reshape(m_y, [1, NV, BV])
                b_score += tl.sum(tl.where(m_found, b_found * tl.reshape(b_w, [1, NV, BV]), 0.0), 2)
        m_most = tl.reshape(m_x, [NA, BT, 1]) & (b_some > 0)
        if x_weight is not None:
            b_w = tl.load(x_weight + o_i.to(tl.int64) * Nt + o_t, mask=m_x, other=0)
            b_most *= tl.reshape(b_w, [NA, BT, 1])
        b_score += tl.sum(tl.where(m_most, b_most, 0.0), 1)
        if x_best is not None:
            o_c = tl.reshape(o_t, [NA, BT, 1])
            p_best = x_best + o_a[:, None, None] * s_xba + o_b[None, None, :] * s_xbv + o_c
            tl.store(p_best, b_place.to(x_best.dtype.element_ty), mask=m_s[:, None, :] & (o_c < Nt))
    p_s = scores + o_a[:, None] * s_sa + o_b[None, :] * s_sv
    b_score *= half
    if ADD:
        b_score += tl.load(p_s, mask=m_s, other=0)
    tl.store(p_s, b_score, mask=m_s)


@triton.jit(do_not_specialize=SIZES)
def late_interaction_backward_kernel(
    g,  # [A, V] fp32
    x, y, x_weight, y_weight, x_mask, y_mask, x_best, y_best,
    dx,  # [A, Nt, D], or None
    dw,  # [blocks of channels, A, Nt] fp32, or None
    A, V, Nt, Nv, sharp, half,
    s_xi, s_xt, s_yi, s_yt, s_dxi, s_dxt, s_ga, s_gv, s_xba, s_xbv, s_yba, s_ybv,
    UNIT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, NV: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
    ONE_V: tl.constexpr, ZERO: tl.constexpr, SOFT: tl.constexpr, UNIT_LENGTH: tl.constexpr,
):  # fmt: skip
    """BD channels of BT tokens of an item of x: the weighted sums of what was largest to them, and of those to which they were.

    The weights of a tile of y's tokens are a matrix that the places give; a product adds them up.
    """
    n_d: tl.constexpr = (D + BD - 1) // BD
    n_t = tl.cdiv(Nt, BT)
    i_d = tl.program_id(0) % n_d
    i_t = tl.program_id(0) // n_d % n_t
    i_a = (tl.program_id(0) // n_d // n_t).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_r = o_t < Nt
    o_i = tl.zeros([BT], dtype=tl.int64) + i_a
    m_x = valid(x_mask, o_i, o_t, m_r, Nt)
    p_x = rows_of(x, o_i, o_t, s_xi, s_xt, UNIT)
    b_wx = tl.full([BT], 1.0, dtype=tl.float32)
    if x_weight is not None:
        b_wx = tl.load(x_weight + i_a * Nt + o_t, mask=m_x, other=0)
    b_dx = tl.zeros([BT, BD], dtype=tl.float32)
    b_own = tl.zeros([BT, BD], dtype=tl.float32)
    b_dw = tl.zeros([BT], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, NV)):
        o_b = (i_v * NV + tl.arange(0, NV)).to(tl.int64)
        b_g = tl.load(g + i_a * s_ga + o_b * s_gv, mask=o_b < V, other=0) * half
        for i_n in range(1 if ONE_V else tl.cdiv(Nv, BV)):
            o_j, o_n, m_c = places(i_v, NV, BV, V, Nv - i_n * BV)
            o_n += i_n * BV
            m_y = valid(y_mask, o_j, o_n, m_c, Nv)
            m_pair = tl.reshape(m_x[:, None] & m_y[None, :], [BT, NV, BV])
            p_y = rows_of(y, o_j, o_n, s_yi, s_yt, UNIT)
            b_wy = tl.full([NV * BV], 1.0, dtype=tl.float32)
            if y_weight is not None:
                b_wy = tl.load(y_weight + o_j.to(tl.int64) * Nv + o_n, mask=m_y, other=0)
            b_gy = tl.reshape(b_wy, [1, NV, BV]) * b_g[None, :, None]
            b_y = tl.load(p_y + o_d[None, :], mask=m_y[:, None] & m_d[None, :], other=0).to(DOT)
            b_c = tl.zeros([BT, NV, BV], dtype=tl.float32)
            b_m = tl.zeros([BT, NV, BV], dtype=tl.float32)
            if SOFT:
                b_s = similarities(p_x, p_y, m_r, m_c, BT, NV * BV, D, BK, DOT, PRECISION)
                b_s = tl.reshape(b_s, [BT, NV, BV])
                m_row = tl.reshape(m_x, [BT, 1, 1])
                m_column = tl.reshape(m_y, [1, NV, BV])
                if ZERO:
                    b_s *= m_pair.to(tl.float32)
                    m_row = tl.reshape(m_r, [BT, 1, 1])
                    m_column = tl.reshape(m_c, [1, NV, BV])
                b_s = tl.where(m_row & m_column, b_s, 0.0)
                b_p, b_f, b_r = attention(b_s, m_column, sharp, 2, UNIT_LENGTH)
                b_m = attention_gradient(b_s, b_p, b_f, b_r, b_wx[:, None] * b_g[None, :], sharp, 2, UNIT_LENGTH)
                b_dw += tl.sum(b_f * b_g[None, :], 1)
                b_p, b_f, b_r = attention(b_s, m_row, sharp, 0, UNIT_LENGTH)
                b_m += attention_gradient(b_s, b_p, b_f, b_r, tl.sum(b_gy, 0), sharp, 0, UNIT_LENGTH)
                b_c = tl.where(m_pair, b_m, 0.0)
            else:
                o_c = tl.reshape(o_n, [1, NV, BV])
                if x_best is not None:
                    m_b = m_r[:, None] & (o_b < V)[None, :]
                    b_at = tl.load(x_best + i_a * s_xba + o_b[None, :] * s_xbv + o_t[:, None], mask=m_b, other=0).to(tl.int32)
                    b_m = tl.where((b_at[:, :, None] == o_c) & m_pair, b_g[None, :, None], 0.0)
                if y_best is not None:
                    p_best = y_best + i_a * s_yba + o_j.to(tl.int64) * s_ybv + o_n
                    b_at = tl.reshape(tl.load(p_best, mask=m_c, other=0).to(tl.int32), [1, NV, BV])
                    b_c = tl.where((b_at == o_t[:, None, None]) & m_pair, b_gy, 0.0)
                if dw is not None:
                    b_own += tl.dot(tl.reshape(b_m, [BT, NV * BV]).to(DOT), b_y, input_precision=PRECISION)
                else:
                    b_c += b_m * b_wx[:, None, None]
            b_dx += tl.dot(tl.reshape(b_c, [BT, NV * BV]).to(DOT), b_y, input_precision=PRECISION)
    if dw is not None:
        if SOFT:
            b_dw = tl.where(m_x & (i_d == 0), b_dw, 0.0)
        else:
            b_x = tl.load(p_x + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0).to(tl.float32)
            b_dw = tl.sum(b_x * b_own, 1)
            b_dx += b_own * b_wx[:, None]
        tl.store(dw + (i_d * A + i_a) * Nt + o_t, b_dw, mask=m_r)
    if dx is not None:
        p_dx = rows_of(dx, o_i, o_t, s_dxi, s_dxt, UNIT) + o_d[None, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_r[:, None] & m_d[None, :])


# Texts and videos, their weights and their masks, or the other way around.
Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _kept(x_best: Tensor | None, y_best: Tensor | None, swapped: bool) -> dict[str, Any]:
    """The places, and how far they are from item to item."""
    args: dict[str, Any] = {"x_best": x_best, "y_best": y_best}
    for name, best in (("xb", x_best), ("yb", y_best)):
        first, second = (0, 0) if best is None else (best.stride(1), best.stride(0)) if swapped else best.stride()[:2]
        args |= {f"s_{name}a": first, f"s_{name}v": second}
    return args


def _searches(rows: int, columns: int, both: bool) -> list[tuple[bool, bool]]:
    """Whether x is the videos, and whether y's tokens seek theirs too: one launch if a tile holds one side's tokens."""
    if not both:
        return [(False, False)]
    if rows <= MOST:
        return [(False, True)]
    return [(True, True)] if columns <= MOST else [(False, False), (True, False)]


def plan(
    text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None, text_mask: Tensor | None,
    video_mask: Tensor | None, scores: Tensor, text_best: Tensor | None, video_best: Tensor | None,
    both: bool, zero: bool, temperature: float, unit_length: bool,
) -> list[Launch]:  # fmt: skip
    """The launches that write the scores and, where memory is given, the places of maxima."""
    launches: list[Launch] = []
    sides = [(text, text_weight, text_mask, text_best), (video, video_weight, video_mask, video_best)]
    for swapped, across in _searches(text.shape[1], video.shape[1], both):
        (x, x_weight, x_mask, x_best), (y, y_weight, y_mask, y_best) = reversed(sides) if swapped else sides
        tile = tile_of(x.shape[1], y.shape[1], x.shape[2], x.element_size(), across, temperature > 0)
        stride, unit = steps(x=x, y=y)
        args: dict[str, Any] = {"x": x, "y": y, "x_weight": x_weight, "y_weight": y_weight if across else None}
        args |= {"x_mask": _bytes(x_mask), "y_mask": _bytes(y_mask), "scores": scores}
        args |= _kept(x_best, y_best if across else None, swapped)
        args |= {"A": len(x), "V": len(y), "Nt": x.shape[1], "Nv": y.shape[1], **stride}
        args |= {"sharp": 1 / temperature if temperature else 0.0, "half": 0.5 if both else 1.0}
        args |= dict(zip(("s_sv", "s_sa") if swapped else ("s_sa", "s_sv"), scores.stride()))
        blocks, others = cdiv(x.shape[1], tile.BT), cdiv(y.shape[1], tile.BV)
        constexprs = {**constants(x), "UNIT": unit, "BD": tile.BD, "NA": tile.NA, "BT": tile.BT, "NV": tile.NV, "BV": tile.BV}
        constexprs |= {"ONE_T": blocks == 1, "ONE_V": others == 1, "ACROSS": across, "ZERO": zero, "SOFT": temperature > 0}
        constexprs |= {"UNIT_LENGTH": unit_length, "ADD": bool(launches)}
        programs = cdiv(len(x), tile.NA) * cdiv(len(y), tile.NV)
        loops = [cdiv(x.shape[2], tile.BD), *(n for n in (others, blocks) if n > 1)]
        launches.append(
            Launch(late_interaction_kernel, programs, args, constexprs, tile.threads, tile.stages, loops=tuple(loops))
        )
    return launches


def plan_backward(
    grad: Tensor, x: Tensor, y: Tensor, x_weight: Tensor | None, y_weight: Tensor | None, x_mask: Tensor | None,
    y_mask: Tensor | None, x_best: Tensor | None, y_best: Tensor | None, dx: Tensor | None, dw: Tensor | None,
    both: bool, zero: bool, temperature: float, unit_length: bool,
) -> Launch:  # fmt: skip
    """The launch that writes the gradients of x and, in parts, of its weights; ``grad`` is ``[items of x, items of y]``."""
    wide, rows = x.element_size() == 4, x.shape[1]
    bt = max(16, min(pow2(rows), MOST if temperature else 32 if wide else 64))
    nv, bv = together(y.shape[1], 16 if wide else 32 if temperature else 64, MOST if temperature else 16 if wide else 64)
    bd, others = block_of_channels(x, temperature > 0), cdiv(y.shape[1], bv)
    threads = 256 if others > 1 and (wide or bt > 32) else 128
    if bt * nv * bv > 32 * threads:
        threads = 512
    stride, unit = steps(x=x, y=y, dx=x if dx is None else dx)
    args: dict[str, Any] = {"g": grad, "x": x, "y": y, "x_weight": x_weight, "y_weight": y_weight, "dx": dx, "dw": dw}
    args |= {"x_mask": _bytes(x_mask), "y_mask": _bytes(y_mask), **_kept(x_best, y_best, False)}
    args |= {"A": len(x), "V": len(y), "Nt": rows, "Nv": y.shape[1], **stride, "s_ga": grad.stride(0), "s_gv": grad.stride(1)}
    args |= {"sharp": 1 / temperature if temperature else 0.0, "half": 0.5 if both else 1.0}
    constexprs = {**constants(x), "UNIT": unit, "BD": bd, "BT": bt, "NV": nv, "BV": bv, "ONE_V": others == 1, "ZERO": zero}
    constexprs |= {"BK": min(bd, 16 if wide else 64), "SOFT": temperature > 0, "UNIT_LENGTH": unit_length}
    programs = len(x) * cdiv(rows, bt) * cdiv(x.shape[2], bd)
    loops = [cdiv(x.shape[2], constexprs["BK"])] if temperature else []
    loops += [others] if others > 1 else []
    return Launch(late_interaction_backward_kernel, programs, args, constexprs, threads, loops=(*loops, cdiv(len(y), nv)))


def block_of_channels(x: Tensor, soft: bool) -> int:
    """How many a program of the backward kernel adds up."""
    return min(max(pow2(x.shape[2]), 16), 64 if soft or x.element_size() == 4 else 128)


def forward(
    text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None, text_mask: Tensor | None,
    video_mask: Tensor | None, both: bool, zero: bool, temperature: float, unit: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = (text, video, text_weight, video_weight, text_mask, video_mask)
    found, done = begun(*given, both, zero, temperature, unit, keep)
    if done:
        return found
    scores, *best = found
    run(plan, (*given, scores, *(x if x.numel() else None for x in best)), (both, zero, temperature, unit))
    return found


def backward(
    grad: Tensor, text: Tensor, video: Tensor, text_weight: Tensor | None, video_weight: Tensor | None,
    text_mask: Tensor | None, video_mask: Tensor | None, both: bool, zero: bool, temperature: float, unit: bool, keep: bool,
    text_best: Tensor, video_best: Tensor, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    given: Given = (text, video, text_weight, video_weight, text_mask, video_mask)
    rest = (both, zero, temperature, unit, keep, text_best, video_best, wanted)
    grads = OPS["late_interaction"].fake_backward(grad, *given, *rest)  # type: ignore[misc]
    if text.numel() == 0 or video.numel() == 0:
        for x in grads:
            x.zero_()
        return grads
    if not temperature and text_best.numel() == 0:  # they were not asked for
        _, text_best, video_best = forward(*given, both, zero, temperature, unit, True)
    best: list[Any] = [x if x.numel() else None for x in (text_best, video_best)]
    for i, (dx, dw) in enumerate(zip(grads[:2], grads[2:])):
        if not wanted[i] and dw.numel() == 0:
            continue
        if i == 1:  # the sides change places
            grad, given = grad.t(), (given[1], given[0], given[3], given[2], given[5], given[4])
            best = [x if x is None else x.transpose(0, 1) for x in reversed(best)]
        x = given[0]
        parts = None
        if dw.numel():
            parts = torch.empty(
                cdiv(x.shape[2], block_of_channels(x, temperature > 0)), *dw.shape, dtype=torch.float32, device=x.device
            )
        into = (dx if wanted[i] else None, parts)
        run(plan_backward, (grad, *given, *best, *into), (both, zero, temperature, unit))
        if parts is not None:
            torch.sum(parts, 0, out=dw)
    return grads


def _call(shape: tuple[int, ...], extras: str, dtype: torch.dtype) -> tuple[Given, tuple[bool, bool, float, bool], list[Any]]:
    """Arguments on the meta device of ``shape = (A, Nt, V, Nv, D)``, options, and the places of maxima."""
    texts, rows, videos, columns, dim = shape
    meta: dict[str, Any] = {"device": "meta"}
    text = torch.empty(texts, rows, dim, dtype=dtype, **meta)
    video = torch.empty(videos, columns, dim, dtype=dtype, **meta)
    both, temperature = "maxsim" not in extras, 0.01 if "softmax" in extras else 0.0
    weights = (torch.empty(texts, rows, **meta), torch.empty(videos, columns, **meta)) if both else (None, None)
    masks: tuple[Any, Any] = (None, None)
    if "mask" in extras:
        masks = (torch.empty(texts, rows, dtype=torch.bool, **meta), torch.empty(videos, columns, dtype=torch.bool, **meta))
    options = (both, "zero" in extras, temperature, "unit" in extras)
    given: Given = (text, video, *weights, *masks)
    _, *best = empty_output(*given, *options, "places" in extras or "backward" in extras)
    return given, options, [x if x.numel() else None for x in best]


def _launch(shape: tuple[int, ...], extras: str, dtype: torch.dtype) -> Launch:
    given, options, best = _call(shape, extras, dtype)
    return plan(*given, torch.empty(shape[0], shape[2], device="meta"), best[0], best[1], *options)[-1]


def _backward_launch(shape: tuple[int, ...], extras: str, dtype: torch.dtype) -> Launch:
    given, options, best = _call(shape, extras + " backward", dtype)
    text, weight, dw = given[0], given[2], None
    if "dw" in extras and weight is not None:
        dw = torch.empty(cdiv(shape[4], block_of_channels(text, options[2] > 0)), *weight.shape, device="meta")
    grad = torch.empty(shape[0], shape[2], device="meta")
    return plan_backward(grad, *given, best[0], best[1], torch.empty_like(text), dw, *options)


def _entries(shape: tuple[int, ...], extras: str = "") -> list[Entry]:
    name = f"late_interaction{{}} {shape[1]}x{shape[3]} D{shape[4]} {extras}".strip()
    return [
        Entry(name.format(""), partial(_launch, shape, extras), dots=True),
        Entry(name.format(" backward"), partial(_backward_launch, shape, extras), dots=True),
    ]


AOT = [
    *_entries((256, 32, 256, 12, 512), "mask, places, dw"),
    *_entries((256, 77, 256, 49, 512), "places"),
    *_entries((256, 32, 256, 12, 512), "softmax, mask, dw"),
    *_entries((256, 1, 256, 12, 512), "softmax, unit"),
    *_entries((256, 32, 256, 12, 512), "zero, mask, places"),
    *_entries((128, 32, 128, 300, 128), "maxsim, mask, places"),
    *_entries((1, 1024, 1024, 1024, 128), "maxsim, places"),
    *_entries((32, 200, 32, 200, 256), "places"),
    Entry("late_interaction, all sizes 1", partial(_launch, (1,) * 5, "places"), (torch.bfloat16,), False, False),
    Entry("late_interaction backward, all sizes 1", partial(_backward_launch, (1,) * 5, "dw"), (torch.bfloat16,), False, False),
]
