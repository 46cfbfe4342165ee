"""What the Triton kernels of ``frame_attention`` share: tiles, which frames are read, a tile of keys joined to a sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..temporal_attention.triton_tiles import strides
from ..triton_common import dot_precision, dots_in_fp32, pow2

SIZES = ["T", "LQ", "L", "M", "heads", "FIRST", "LAST"]  # of which kernels are not compiled anew
EXTRA = ["s_ekb", "s_ekt", "s_evb", "s_evt"]  # nor where tokens are common to clips, or to a single one


@dataclass(frozen=True)
class Tiles:
    """``rows`` of queries against ``keys`` at a time, ``BD`` channels padded."""

    rows: int
    keys: int
    BD: int
    threads: int
    stages: int


def tiles(q: Tensor, kernel: str) -> Tiles:
    """The tiles of a "forward", "queries" or "keys" kernel: of shape and dtype alone, for the same bits each time."""
    bd = max(pow2(q.shape[4]), 16)
    if q.element_size() == 4:  # products on the ordinary units hold their operands in registers
        return Tiles(32, 16, bd, 128 if bd <= 64 else 256, 1)
    if bd > 128:
        return Tiles(32, 32, bd, 128, 1)
    if kernel == "keys":  # with more rows AMD's compiler spills
        return Tiles(32, 64 if bd <= 64 else 32, bd, 128, 2)
    # few keys a step: their exponentials are waited for less than a larger product's
    return Tiles(128 if kernel == "forward" and bd <= 64 and q.shape[2] > 64 else 64, 32, bd, 128, 3 if bd <= 64 else 2)


def common(
    heads: dict[str, Any], mask: Tensor | None, offsets: tuple[int, ...], edges: str, scale: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of a launch for the tensors by their names in the kernel; "l" and "d" have no channels."""
    q, k, ek = heads["q"], heads["k"], heads.get("ek")
    rows = {name: x for name, x in heads.items() if name not in "ld" and x is not None}
    lying, unit = strides(**rows)
    steps: dict[str, int | None] = {**lying}
    steps |= {f"s_{name}{axis}": None for name, x in heads.items() if x is None for axis in "btnh"}
    sums = heads["l"]
    steps |= dict(zip(("s_lb", "s_lt", "s_ln", "s_lh"), sums.stride()))
    args = {**heads, "mask": None if mask is None else mask.view(torch.uint8), "scale": float(scale), **steps}
    args |= {"T": q.shape[1], "LQ": q.shape[2], "L": k.shape[2], "heads": q.shape[3]}
    args["M"] = None if ek is None else ek.shape[2]
    first, last, apart = window(offsets, q.shape[1])
    args |= {"FIRST": first, "LAST": last}
    edges = edges if offsets else "mask"
    whole = dots_in_fp32(q.dtype) or q.dtype == torch.float32
    dot = tl.float32 if whole else (tl.float16 if q.dtype == torch.float16 else tl.bfloat16)
    wide = any(sum((n - 1) * step for n, step in zip(x.shape[1:3], x.stride()[1:3])) >= 2**31 - 2**10 for x in rows.values())
    constexprs = {"WIDE": wide, "OFFSETS": apart, "EDGES": edges, "DOT": dot, "UNIT": unit}
    return args, {**constexprs, "PRECISION": dot_precision(q.dtype), "D": q.shape[4]}


def window(offsets: tuple[int, ...], frames: int) -> tuple[int, int, tuple[int, ...] | None]:
    """``(first, last, None)`` of offsets that follow each other, or of all frames; else ``(0, 0, offsets)``."""
    if not offsets:
        return -frames, frames, None
    first, last = min(offsets), max(offsets)
    return (first, last, None) if sorted(offsets) == list(range(first, last + 1)) else (0, 0, offsets)


@triton.jit
def frames_seen(i_t, T, FIRST, LAST, OFFSETS: tl.constexpr, EDGES: tl.constexpr):
    """The first offset from frame i_t that is read, and how many frames are: those of a window within the clip, else all."""
    if OFFSETS is not None:
        i_f = i_t * 0
        n_f = i_f + len(OFFSETS)
    elif EDGES == "clamp":
        i_f = i_t * 0 + FIRST
        n_f = LAST - i_f + 1
    else:
        i_f = tl.maximum(FIRST, -i_t)
        n_f = tl.maximum(tl.minimum(LAST + 1, T - i_t) - i_f, 0)
    return i_f, n_f


@triton.jit
def frame_of(o_f, i_t, i_f, T, OFFSETS: tl.constexpr, EDGES: tl.constexpr):
    """The o_f-th frames that frame i_t sees, and whether they are within the clip."""
    if OFFSETS is not None:
        o_s = i_t + OFFSETS[0] + o_f * 0
        for i in tl.static_range(1, len(OFFSETS)):
            o_s = tl.where(o_f == i, i_t + OFFSETS[i], o_s)
    else:
        o_s = i_t + i_f + o_f
    if EDGES == "clamp":
        o_s = tl.minimum(tl.maximum(o_s, 0), T - 1)
    return o_s, (o_s >= 0) & (o_s < T)


@triton.jit
def frames_outside(i_t, n_f, T, FIRST, LAST, OFFSETS: tl.constexpr):
    """How many of the frames that frame i_t sees lie outside the clip."""
    if OFFSETS is not None:
        n = i_t * 0
        for i in tl.static_range(len(OFFSETS)):
            n += ((i_t + OFFSETS[i] < 0) | (i_t + OFFSETS[i] >= T)).to(tl.int32)
    else:
        n = LAST - FIRST + 1 - n_f
    return n


@triton.jit
def of_program(rows, T, heads, ROWS: tl.constexpr):
    """A program's clip, frame, head and rows: blocks of a head are neighbours, then heads of a frame."""
    n_r = tl.cdiv(rows, ROWS)
    i_p = tl.program_id(0)
    i_h = i_p // n_r % heads
    i_t = i_p // n_r // heads % T
    i_b = i_p // n_r // heads // T
    return i_b, i_t, i_h, i_p % n_r * ROWS + tl.arange(0, ROWS)


@triton.jit
def first_rows(ROWS: tl.constexpr, N):
    """The first rows of frames of N tokens that are walked through as one sequence: their frames and tokens."""
    o_r = tl.arange(0, ROWS)
    n = tl.maximum(N, 1)  # frames may have no token
    return o_r // n, o_r % n


@triton.jit
def next_rows(o_f, o_n, N, ROWS: tl.constexpr, SHORT: tl.constexpr):
    """So many rows on: without a division where a frame has as many, and no step leaves more than one behind."""
    o_n += ROWS
    if SHORT:
        o_f += o_n // N
        o_n = o_n % N
    else:
        m_n = o_n >= N
        o_n = tl.where(m_n, o_n - N, o_n)
        o_f += m_n.to(tl.int32)
    return o_f, o_n


@triton.jit
def start_of(x, i_b, i_h, s_b, s_h, UNIT: tl.constexpr):
    """A head of a clip."""
    return x + (i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h) * UNIT


@triton.jit
def within(p_x, o_t, o_n, s_t, s_n, BD: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """``[R, BD]`` pointers to frames o_t and tokens o_n of a head of a clip, of 2^31 elements or more where WIDE."""
    if WIDE:
        row = (o_t.to(tl.int64) * s_t + o_n.to(tl.int64) * s_n) * UNIT
    else:
        row = (o_t * s_t + o_n * s_n) * UNIT
    return p_x + row[:, None] + tl.arange(0, BD)[None, :]


@triton.jit
def join_keys(b_q, b_k, b_v, m_k, b_m, b_l, b_o, scale, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of keys and values joined to the sums: largest score (times log2(e)), sum of exponentials, weighted values."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.4426950408889634)  # [BQ, BK]
    b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_alpha = tl.exp2(b_m - b_safe)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_o = b_o * b_alpha[:, None] + tl.dot(b_p.to(DOT), b_v, input_precision=PRECISION)
    return b_new, b_l, b_o
