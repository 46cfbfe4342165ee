"""Triton kernels of ``frame_bias`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..products import block_count, gradient
from ..temporal_attention.triton_tiles import pointers, read, strides, write
from ..triton_common import Launch, cdiv, dot_precision, dots_in_fp32, pow2
from ..triton_launch import run
from .blocks import empty_gradients, empty_output
from .cells import Cells, add_weight_gradients, cell_gradients, outputs


@triton.jit
def _cell(
    o_q, o_k, i_f, F, side,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """``[BQ, BK]``: where pairs of queries and keys of frame i_f of F stand among the cells; see cells.py."""
    o_j = o_q % WIDTH
    o_row = (o_q // WIDTH * (WIDTH // GROUP) + o_j // GROUP).to(PLACE) * F + i_f
    o_row = (o_row * GROUP + o_j % GROUP) * (HEIGHT * 2 * COLUMNS) + side * COLUMNS + o_j % GROUP
    o_cell = (HEIGHT - 1 - o_k // WIDTH) * (2 * COLUMNS) + WIDTH - 1 - o_k % WIDTH
    return o_row[:, None] + o_cell[None, :]


@triton.jit
def _frame(x, i_f, i_h, o_p, T, prefix, s_b, s_t, s_n, s_h, BD: tl.constexpr, UNIT: tl.constexpr):
    """``[R, BD]`` pointers to patches of frame i_f of all clips; strides are in units of UNIT elements."""
    return pointers(x, i_f // T, i_h, (i_f % T).to(tl.int64), o_p + prefix, s_b, s_t, s_n, s_h, BD, UNIT)


@triton.jit
def _scores(b_q, b_k, o_k, scale, P: tl.constexpr, PRECISION: tl.constexpr):
    """``[BQ, BK]``, -inf behind the last key."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    return tl.where((o_k < P)[None, :], b_s, float("-inf"))


@triton.jit
def _exp(b_x):
    """What is large cancels before log2(e) rounds it."""
    return tl.exp2(b_x * 1.4426950408889634)


@triton.jit
def _softmax(b_s, stats, o_row, m_q, rows):
    """``[BQ, BK]`` of ``stats [2, rows]``: of each query the largest score, and one over the sum of exponentials."""
    b_m = tl.load(stats + o_row, mask=m_q, other=0)
    return _exp(b_s - b_m[:, None]) * tl.load(stats + rows + o_row, mask=m_q, other=0)[:, None]


@triton.jit
def _mean_gradient(d_cells, o_cell, m_pair, H):
    return tl.load(d_cells + o_cell, mask=m_pair, other=0).to(tl.float32) * (1.0 / H)


@triton.jit(do_not_specialize=["F"])
def frame_bias_cells_kernel(
    q, k, cells,
    stats,  # [2, 2, F, H, P] fp32, or None where a tile holds all keys
    F, T, H, prefix, scale,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    PLACE: tl.constexpr,  # dtype that counts cells
    DOT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The mean over heads of the attention of a tile of queries to a tile of keys of the previous or the next frame."""
    P: tl.constexpr = HEIGHT * WIDTH
    n_q: tl.constexpr = (P + BQ - 1) // BQ
    n_k: tl.constexpr = (P + BK - 1) // BK
    i_p = tl.program_id(0)
    i_f = i_p // (n_q * n_k * 2)
    side = i_p // (n_q * n_k) % 2
    o_q = i_p % n_q * BQ + tl.arange(0, BQ)
    o_k = i_p // n_q % n_k * BK + tl.arange(0, BK)
    i_u = i_f % T + 2 * side - 1
    if (i_u >= 0) & (i_u < T):
        m_q = o_q < P
        p_q = _frame(q, i_f, i_p * 0, o_q, T, prefix, s_qb, s_qt, s_qn, s_qh, BD, UNIT)
        p_k = _frame(k, i_f + 2 * side - 1, i_p * 0, o_k, T, prefix, s_kb, s_kt, s_kn, s_kh, BD, UNIT)
        o_row = (side.to(tl.int64) * F + i_f) * H * P + o_q
        rows = tl.cast(F, tl.int64) * 2 * H * P
        b_mean = tl.zeros([BQ, BK], dtype=tl.float32)
        for _ in range(H):
            b_s = _scores(read(p_q, m_q, D, BD, DOT), read(p_k, o_k < P, D, BD, DOT), o_k, scale, P, PRECISION)
            if stats is None:
                b_e = _exp(b_s - tl.max(b_s, 1)[:, None])
                b_mean += b_e * (1.0 / tl.sum(b_e, 1))[:, None]
            else:
                b_mean += _softmax(b_s, stats, o_row, m_q, rows)
                o_row += P
            p_q += s_qh * UNIT
            p_k += s_kh * UNIT
        p_cells = cells + _cell(o_q, o_k, i_f, F, side, HEIGHT, WIDTH, GROUP, COLUMNS, PLACE)
        m_pair = m_q[:, None] & (o_k < P)[None, :]
        tl.store(p_cells, (b_mean * (1.0 / H)).to(cells.dtype.element_ty), mask=m_pair)


@triton.jit(do_not_specialize=["F"])
def frame_bias_rows_kernel(
    q, k,
    d_cells, dq, delta,  # None where stats alone are wanted; delta [2, F, H, P] fp32
    stats,  # [2, 2, F, H, P] fp32
    F, T, H, prefix, scale,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_dqb, s_dqt, s_dqn, s_dqh,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    PLACE: tl.constexpr,  # dtype that counts cells
    DOT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of a tile of queries: the largest score and the softmax' sum, <softmax, its gradient>, and the gradient of q."""
    P: tl.constexpr = HEIGHT * WIDTH
    n_q: tl.constexpr = (P + BQ - 1) // BQ
    i_p = tl.program_id(0)
    i_h = i_p // n_q % H
    i_f = i_p // n_q // H
    o_q = i_p % n_q * BQ + tl.arange(0, BQ)
    m_q = o_q < P
    p_q = _frame(q, i_f, i_h, o_q, T, prefix, s_qb, s_qt, s_qn, s_qh, BD, UNIT)
    b_q = read(p_q, m_q, D, BD, DOT)
    b_dq = tl.zeros([BQ, BD], dtype=tl.float32)
    rows = tl.cast(F, tl.int64) * 2 * H * P
    for side in tl.static_range(2):
        i_u = i_f % T + 2 * side - 1
        if (i_u >= 0) & (i_u < T):
            b_m = tl.full([BQ], float("-inf"), dtype=tl.float32)
            b_l = tl.zeros([BQ], dtype=tl.float32)
            b_delta = tl.zeros([BQ], dtype=tl.float32)
            for first in range(0, P, BK):
                o_k = first + tl.arange(0, BK)
                p_k = _frame(k, i_f + 2 * side - 1, i_h, o_k, T, prefix, s_kb, s_kt, s_kn, s_kh, BD, UNIT)
                b_s = _scores(b_q, read(p_k, o_k < P, D, BD, DOT), o_k, scale, P, PRECISION)
                b_new = tl.maximum(b_m, tl.max(b_s, 1))
                b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_alpha = _exp(b_m - b_safe)
                b_p = _exp(b_s - b_safe[:, None])
                b_l = b_l * b_alpha + tl.sum(b_p, 1)
                if d_cells is not None:
                    m_pair = m_q[:, None] & (o_k < P)[None, :]
                    o_cell = _cell(o_q, o_k, i_f, F, side, HEIGHT, WIDTH, GROUP, COLUMNS, PLACE)
                    b_delta = b_delta * b_alpha + tl.sum(b_p * _mean_gradient(d_cells, o_cell, m_pair, H), 1)
                b_m = b_new
            b_l = 1.0 / b_l
            o_row = ((i_f.to(tl.int64) + side * F) * H + i_h) * P + o_q
            tl.store(stats + o_row, b_m, mask=m_q)
            tl.store(stats + rows + o_row, b_l, mask=m_q)
            if d_cells is not None:
                b_delta = b_delta * b_l
                tl.store(delta + o_row, b_delta, mask=m_q)
                for first in range(0, P, BK):
                    o_k = first + tl.arange(0, BK)
                    p_k = _frame(k, i_f + 2 * side - 1, i_h, o_k, T, prefix, s_kb, s_kt, s_kn, s_kh, BD, UNIT)
                    b_k = read(p_k, o_k < P, D, BD, DOT)
                    b_p = _exp(_scores(b_q, b_k, o_k, scale, P, PRECISION) - b_m[:, None]) * b_l[:, None]
                    m_pair = m_q[:, None] & (o_k < P)[None, :]
                    o_cell = _cell(o_q, o_k, i_f, F, side, HEIGHT, WIDTH, GROUP, COLUMNS, PLACE)
                    b_ds = b_p * (_mean_gradient(d_cells, o_cell, m_pair, H) - b_delta[:, None])
                    b_ds = tl.where(m_pair, b_ds * scale, 0.0).to(DOT)
                    b_dq += tl.dot(b_ds, b_k, input_precision=PRECISION)
    if d_cells is not None:
        write(_frame(dq, i_f, i_h, o_q, T, prefix, s_dqb, s_dqt, s_dqn, s_dqh, BD, UNIT), b_dq, m_q, D, BD)


@triton.jit(do_not_specialize=["F"])
def frame_bias_columns_kernel(
    q, k, d_cells, dk, delta, stats,
    F, T, H, prefix, scale,
    s_qb, s_qt, s_qn, s_qh,
    s_kb, s_kt, s_kn, s_kh,
    s_dkb, s_dkt, s_dkn, s_dkh,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    PLACE: tl.constexpr,  # dtype that counts cells
    DOT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of a tile of keys: the gradient of k, from the frame before, whose next one theirs is, then from the one after."""
    P: tl.constexpr = HEIGHT * WIDTH
    n_k: tl.constexpr = (P + BK - 1) // BK
    i_p = tl.program_id(0)
    i_h = i_p // n_k % H
    i_u = i_p // n_k // H
    o_k = i_p % n_k * BK + tl.arange(0, BK)
    m_k = o_k < P
    b_k = read(_frame(k, i_u, i_h, o_k, T, prefix, s_kb, s_kt, s_kn, s_kh, BD, UNIT), m_k, D, BD, DOT)
    b_dk = tl.zeros([BK, BD], dtype=tl.float32)
    rows = tl.cast(F, tl.int64) * 2 * H * P
    for turn in tl.static_range(2):
        side = 1 - turn
        i_f = i_u + 2 * turn - 1
        i_t = i_u % T + 2 * turn - 1
        if (i_t >= 0) & (i_t < T):
            for first in range(0, P, BQ):
                o_q = first + tl.arange(0, BQ)
                m_q = o_q < P
                p_q = _frame(q, i_f, i_h, o_q, T, prefix, s_qb, s_qt, s_qn, s_qh, BD, UNIT)
                b_q = read(p_q, m_q, D, BD, DOT)
                o_row = ((i_f.to(tl.int64) + side * F) * H + i_h) * P + o_q
                b_s = _scores(b_q, b_k, o_k, scale, P, PRECISION)
                b_p = _softmax(b_s, stats, o_row, m_q, rows)
                m_pair = m_q[:, None] & m_k[None, :]
                o_cell = _cell(o_q, o_k, i_f, F, side, HEIGHT, WIDTH, GROUP, COLUMNS, PLACE)
                b_ds = _mean_gradient(d_cells, o_cell, m_pair, H) - tl.load(delta + o_row, mask=m_q, other=0)[:, None]
                b_ds = tl.where(m_pair, b_p * b_ds * scale, 0.0).to(DOT)
                b_dk += tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
    write(_frame(dk, i_u, i_h, o_k, T, prefix, s_dkb, s_dkt, s_dkn, s_dkh, BD, UNIT), b_dk, m_k, D, BD)


_STEPS = ("s_dqb", "s_dqt", "s_dqn", "s_dqh")


@dataclass(frozen=True)
class Tiles:
    """``BQ`` queries, ``BK`` keys, ``BD`` channels padded."""

    BQ: int
    BK: int
    BD: int
    threads: int


WHOLE = 256  # keys of a frame that a tile holds at once in 16 bits


def whole(patches: int, dim: int, itemsize: int) -> bool:
    """Whether the forward kernel holds all keys of a frame in one tile, and needs no pass for the softmax' sums."""
    return itemsize == 2 and patches * pow2(dim) <= WHOLE * 64 and patches <= WHOLE


def tiles(patches: int, dim: int, itemsize: int, forward: bool) -> Tiles:
    """The tiles of a call: chosen by shape and dtype alone, so that the same call always gives the same bits."""
    bd = max(pow2(dim), 16)
    if itemsize == 4:  # products on the ordinary units hold their operands in registers: small tiles
        return Tiles(16, 32 if bd <= 64 else 16, bd, 128)
    if forward and whole(patches, dim, itemsize):
        keys = max(pow2(patches), 16)
        return Tiles(16 if keys > 128 else min(32, keys), keys, bd, 128)
    return Tiles(64, 64, bd, 128)


def _arguments(q: Tensor, grid: Cells, prefix: int, scale: float, tile: Tiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all kernels take, and the compile-time constants but UNIT."""
    batch, frames, _, heads, dim = q.shape
    wide = dots_in_fp32(q.dtype) or q.dtype == torch.float32
    dot = tl.float32 if wide else (tl.float16 if q.dtype == torch.float16 else tl.bfloat16)
    args: dict[str, Any] = {"F": batch * frames, "T": frames, "H": heads, "prefix": prefix, "scale": float(scale)}
    constexprs: dict[str, Any] = {"HEIGHT": grid.height, "WIDTH": grid.width, "GROUP": grid.group, "COLUMNS": grid.columns}
    constexprs["PLACE"] = tl.int32 if prod(grid.shape(batch * frames)) < 2**31 else tl.int64
    constexprs |= {"DOT": dot, "PRECISION": dot_precision(q.dtype), "D": dim, "BQ": tile.BQ, "BK": tile.BK, "BD": tile.BD}
    return args, constexprs


def plan(q: Tensor, k: Tensor, cells: Tensor, height: int, width: int, prefix: int, scale: float) -> list[Launch]:
    """The launches that scatter attention to cells, which are zero."""
    grid, (batch, frames, _, heads, dim) = Cells(height, width), q.shape
    patches, tile = height * width, tiles(height * width, dim, q.itemsize, forward=True)
    args, constexprs = _arguments(q, grid, prefix, scale, tile)
    steps, unit = strides(q=q, k=k)
    args |= {"q": q, "k": k, "stats": None, **steps}
    constexprs["UNIT"] = unit
    n_q, launches = cdiv(patches, tile.BQ), []
    if not whole(patches, dim, q.itemsize):
        args["stats"] = torch.empty(2, 2, batch * frames, heads, patches, dtype=torch.float32, device=q.device)
        nothing: dict[str, Any] = {"d_cells": None, "dq": None, "delta": None, **dict.fromkeys(_STEPS, 0)}
        loops = (cdiv(patches, tile.BK),)
        programs = n_q * heads * batch * frames
        launches = [Launch(frame_bias_rows_kernel, programs, {**args, **nothing}, constexprs, tile.threads, loops=loops * 2)]
    programs = n_q * cdiv(patches, tile.BK) * 2 * batch * frames
    args["cells"] = cells
    return [*launches, Launch(frame_bias_cells_kernel, programs, args, constexprs, tile.threads, loops=(heads,))]


def plan_backward(
    q: Tensor, k: Tensor, d_cells: Tensor, dq: Tensor, dk: Tensor, height: int, width: int, prefix: int, scale: float
) -> list[Launch]:
    """The launches that write the gradients of the patches of q and k."""
    grid, (batch, frames, _, heads, dim) = Cells(height, width), q.shape
    patches, tile = height * width, tiles(height * width, dim, q.itemsize, forward=False)
    args, constexprs = _arguments(q, grid, prefix, scale, tile)
    rows = (2, batch * frames, heads, patches)
    stats, delta = (torch.empty(shape, dtype=torch.float32, device=q.device) for shape in ((2, *rows), rows))
    args |= {"q": q, "k": k, "d_cells": d_cells, "stats": stats, "delta": delta}
    launches = []
    for kernel, name, out, block, loops in (
        (frame_bias_rows_kernel, "dq", dq, tile.BQ, (cdiv(patches, tile.BK),) * 4),
        (frame_bias_columns_kernel, "dk", dk, tile.BK, (cdiv(patches, tile.BQ),) * 2),
    ):
        steps, unit = strides(q=q, k=k, **{name: out})
        programs = cdiv(patches, block) * heads * batch * frames
        own = {**args, name: out, **steps}
        launches.append(Launch(kernel, programs, own, {**constexprs, "UNIT": unit}, tile.threads, loops=loops))
    return launches


def clips_at_a_time(q: Tensor, grid: Cells) -> Iterator[slice]:
    """Clips whose cells make a block."""
    count = block_count(q.device, q.shape[1] * grid.height * grid.width * grid.count * q.itemsize)
    for first in range(0, q.shape[0], count):
        yield slice(first, first + count)


def forward(
    q: Tensor, k: Tensor, weight_previous: Tensor, weight_next: Tensor, height: int, width: int, prefix: int, scale: float
) -> Tensor:
    out = empty_output(q, k, weight_previous)
    if q.shape[1] < 2:
        return out.zero_()
    out[:, :, :prefix] = 0
    if out.numel() > 0:
        grid = Cells(height, width)
        for clips in clips_at_a_time(q, grid):
            cells = _attended(grid, q[clips], k[clips], (height, width, prefix, scale))
            outputs(grid, cells, weight_previous, weight_next, out[clips], prefix)
    return out


def _attended(grid: Cells, q: Tensor, k: Tensor, options: tuple[Any, ...]) -> Tensor:
    cells = q.new_zeros(grid.shape(q.shape[0] * q.shape[1]))
    run(plan, (q, k, cells), options)
    return cells


def backward(
    grad: Tensor, q: Tensor, k: Tensor, weight_previous: Tensor, weight_next: Tensor, height: int, width: int, prefix: int,
    scale: float, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the four gradients is wanted; probabilities are computed again."""
    grid, options, (dq, dk) = Cells(height, width), (height, width, prefix, scale), empty_gradients(q, k, prefix)
    sums: Any = None
    if wanted[2] or wanted[3]:
        shape = (grid.groups, 2 * height - 1, 2, grid.columns, weight_previous.shape[1])
        sums = torch.zeros(shape, dtype=torch.float32, device=q.device)
    if grad.numel() == 0:
        dq.zero_(), dk.zero_()
    elif q.shape[1] > 1:
        for clips in clips_at_a_time(q, grid):
            parts = grad[clips], q[clips], k[clips]
            if wanted[0] or wanted[1]:
                d_cells = q.new_zeros(grid.shape(parts[1].shape[0] * q.shape[1]))
                cell_gradients(grid, parts[0], weight_previous, weight_next, prefix, d_cells)
                run(plan_backward, (*parts[1:], d_cells, dq[clips], dk[clips]), options)
                del d_cells
            if sums is not None:
                add_weight_gradients(grid, parts[0], _attended(grid, *parts[1:], options), prefix, sums)
    d_weights = (None, None) if sums is None else grid.disarranged(sums)
    parameters = (q, k, weight_previous, weight_next)
    return tuple(gradient(g, p, w, grad) for g, p, w in zip((dq, dk, *d_weights), parameters, wanted))
