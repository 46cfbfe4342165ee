"""What the Triton kernels of ``late_interaction`` share: tiles of tokens, their similarities, and what is sought in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import dot_precision, dots_in_fp32, pow2

MOST = 128  # tokens of one item that a tile holds


@dataclass(frozen=True)
class Tile:
    """``NA`` items of ``BT`` rows each against ``NV`` items of ``BV`` columns each, ``BD`` channels at a time."""

    NA: int
    BT: int
    NV: int
    BV: int
    BD: int
    threads: int
    stages: int


def together(tokens: int, rows: int, most: int) -> tuple[int, int]:
    """Items of a tile of about so many rows, and the rows of each, of which there are at most so many."""
    each = min(pow2(tokens), most)
    count = max(rows // each, 1) if tokens <= most else 1
    return count, max(each, 16 // count)  # a product has 16 rows


def tile_of(rows: int, columns: int, dim: int, itemsize: int, across: bool, soft: bool) -> Tile:
    """The tile of a call: chosen by shape and dtype alone, so that the same call always gives the same bits."""
    wide = itemsize == 4  # products on the ordinary units hold their operands in registers: small tiles
    held = together(rows, 32 if wide else 64, MOST if across else 64)
    others = together(columns, 32 if wide or soft else 128, MOST if soft or not wide else 32)
    size = held[0] * held[1] * others[0] * others[1]
    if wide or soft:
        threads = max(128 if soft else 64, min(size // 32, 512))
    else:
        threads = 256 if across else 128
    depth = min(max(pow2(dim), 16), 16 if wide else 64)
    return Tile(*held, *others, depth, threads, 1 if wide else 2 if torch.version.hip else 3)


def constants(x: Tensor) -> dict[str, Any]:
    """The compile-time constants that all kernels take."""
    wide = dots_in_fp32(x.dtype) or x.dtype == torch.float32
    dot = tl.float32 if wide else (tl.float16 if x.dtype == torch.float16 else tl.bfloat16)
    return {"DOT": dot, "PRECISION": dot_precision(x.dtype), "D": x.shape[2]}


def steps(**tensors: Tensor) -> tuple[dict[str, int], int]:
    """``s_xi, s_xt`` of a tensor ``[items, tokens, D]`` named x, and so on, in units of the second result's elements: eight
    where that divides them, so that Triton sees it.
    """
    found = {f"s_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("it")}
    sizes = [x.shape[i] for x in tensors.values() for i in range(2)]
    unit = 8 if all(step % 8 == 0 for step, size in zip(found.values(), sizes) if size > 1) else 1
    return {name: step // unit for name, step in found.items()}, unit


@triton.jit
def places(i_block, COUNT: tl.constexpr, EACH: tl.constexpr, items, tokens):
    """Of COUNT * EACH rows: the item, the token, and whether there is such a one."""
    o_r = tl.arange(0, COUNT * EACH)
    o_i = i_block * COUNT + o_r // EACH
    o_t = o_r % EACH
    return o_i, o_t, (o_i < items) & (o_t < tokens)


@triton.jit
def rows_of(x, o_i, o_t, s_i, s_t, UNIT: tl.constexpr):
    """Pointers to the first channels; strides are in units of UNIT elements."""
    return x + ((o_i.to(tl.int64) * s_i + o_t.to(tl.int64) * s_t) * UNIT)[:, None]


@triton.jit
def valid(mask, o_i, o_t, m_r, tokens):
    """Whether the tokens are there and count."""
    if mask is not None:
        m_r = m_r & (tl.load(mask + o_i.to(tl.int64) * tokens + o_t, mask=m_r, other=0) != 0)
    return m_r


@triton.jit
def similarities(
    p_x, p_y, m_x, m_y, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``[M, N]`` products of rows, BD channels at a time."""
    b_s = tl.zeros([M, N], dtype=tl.float32)
    for c in range(0, D, BD):
        o_d = c + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(p_x + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0).to(DOT)
        b_y = tl.load(p_y + o_d[None, :], mask=m_y[:, None] & m_d[None, :], other=0).to(DOT)
        b_s += tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION)
    return b_s


@triton.jit
def _larger(b_a, o_a, b_b, o_b):
    """Of two numbers and their places the larger one, of equal ones the first; NaN is larger than all."""
    m_a = b_a != b_a
    m_b = b_b != b_b
    m_second = (b_b > b_a) | (m_b & (m_a == 0)) | (((b_b == b_a) | (m_a & m_b)) & (o_b < o_a))
    return tl.where(m_second, b_b, b_a), tl.where(m_second, o_b, o_a)


@triton.jit
def _larger_alone(b_a, b_b):
    return tl.where((b_b > b_a) | (b_b != b_b), b_b, b_a)


@triton.jit
def largest(b_s, m_valid, o_place, axis: tl.constexpr, PLACES: tl.constexpr):
    """Over an axis: the largest, NaN where there is one, and the first place that has it; -inf where nothing is valid."""
    b_s = tl.where(m_valid, b_s, float("-inf"))
    if PLACES:
        b_m, b_place = tl.reduce((b_s, tl.broadcast_to(o_place, b_s.shape)), axis, _larger)
    else:
        b_m = tl.reduce(b_s, axis, _larger_alone)
        b_place = tl.zeros(b_m.shape, dtype=tl.int32)
    return b_m, b_place


@triton.jit
def attention(b_s, m_valid, sharp, axis: tl.constexpr, UNIT_LENGTH: tl.constexpr):
    """Over an axis: probabilities, the mean of s that they give (0 where nothing is valid), and one over the length of s."""
    b_v = tl.where(m_valid, b_s, 0.0)
    b_z = b_v * sharp
    b_r = tl.sum(b_v, axis)
    if UNIT_LENGTH:
        b_r = 1.0 / tl.maximum(tl.sqrt(tl.sum(b_v * b_v, axis)), 1e-12)
        b_z = b_z * tl.expand_dims(b_r, axis)
    b_z = tl.where(m_valid, b_z, float("-inf"))
    b_m = tl.max(b_z, axis)
    b_m = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_p = tl.exp2((b_z - tl.expand_dims(b_m, axis)) * 1.4426950408889634)
    b_l = tl.sum(b_p, axis)
    b_p = b_p * tl.expand_dims(1.0 / tl.where(b_l == 0.0, 1.0, b_l), axis)
    return b_p, tl.sum(b_p * b_v, axis), b_r


@triton.jit
def attention_gradient(b_s, b_p, b_f, b_r, b_g, sharp, axis: tl.constexpr, UNIT_LENGTH: tl.constexpr):
    """What s gets of a gradient b_g of that mean: ``p * (1 + (s - f) / temperature)``; of unit length, by way of that too."""
    b_q = b_p * (b_s - tl.expand_dims(b_f, axis)) * sharp
    if UNIT_LENGTH:
        b_r = tl.expand_dims(b_r, axis)
        b_q = (b_q - b_s * b_r * b_r * tl.expand_dims(tl.sum(b_q * b_s, axis), axis)) * b_r
    return tl.expand_dims(b_g, axis) * (b_p + b_q)
