"""Triton kernels of ``patch_embed`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_dense_like
from ..triton_common import Entry, Launch, cdiv, dots_in_fp32, pow2
from ..triton_launch import run
from . import blocks
from .fold import centre, rests, scales

LONGEST = 1024  # weights of a channel that are folded at a time


@triton.jit
def _of_colour(o_k, v_0, v_1, v_2):
    """What belongs to the colours of places [BK] in a patch."""
    i_c = o_k % 3
    return tl.where(i_c == 0, v_0, tl.where(i_c == 1, v_1, v_2)).to(tl.float32)


@triton.jit
def _weight_places(o_k, s_d, s_y, s_x, PW: tl.constexpr):
    """Where weights ``[3, ph, pw]`` of places [BK] in a patch lie."""
    return o_k % 3 * s_d + o_k // (PW * 3) * s_y + o_k % (PW * 3) // 3 * s_x


@triton.jit
def fold_kernel(
    weight, bias, matrix, vector, centres,
    s_c, s_d, s_y, s_x, w_0, w_1, w_2, r_0, r_1, r_2, c_0, c_1, c_2,
    PH: tl.constexpr, PW: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PH * PW * 3
    i_c = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BK], dtype=tl.float32)
    for i_k in range(tl.cdiv(KP, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_w = tl.load(weight + i_c * s_c + _weight_places(o_k, s_d, s_y, s_x, PW), mask=o_k < K, other=0).to(tl.float32)
        b_w = (b_w * _of_colour(o_k, w_0, w_1, w_2)).to(matrix.dtype.element_ty)
        tl.store(matrix + i_c * KP + o_k, b_w, mask=o_k < KP)
        b_sum += b_w.to(tl.float32) * _of_colour(o_k, r_0, r_1, r_2)
        if centres is not None:
            tl.store(centres + o_k, _of_colour(o_k, c_0, c_1, c_2), mask=(o_k < KP) & (i_c == 0))
    b_bias = tl.sum(b_sum, 0)
    if bias is not None:
        b_bias += tl.load(bias + i_c).to(tl.float32)
    tl.store(vector + i_c, b_bias)


@triton.jit
def unfold_kernel(
    product, sums, grad,
    s_c, s_d, s_y, s_x, w_0, w_1, w_2, r_0, r_1, r_2,
    PH: tl.constexpr, PW: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PH * PW * 3
    i_c = tl.program_id(0).to(tl.int64)
    b_sum = tl.load(sums + i_c)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_g = tl.load(product + i_c * K + o_k, mask=o_k < K, other=0) + b_sum * _of_colour(o_k, r_0, r_1, r_2)
        b_g = (b_g * _of_colour(o_k, w_0, w_1, w_2)).to(grad.dtype.element_ty)
        tl.store(grad + i_c * s_c + _weight_places(o_k, s_d, s_y, s_x, PW), b_g, mask=o_k < K)


@triton.jit
def patch_pointers(frames, o_m, T, GH, GW, s_b, s_t, s_h, s_w, PH: tl.constexpr, PW: tl.constexpr):
    """Where patches begin."""
    i_line = o_m // GW
    i_frame = i_line // GH
    o_y, o_x = (i_line % GH) * PH, (o_m % GW) * PW
    o_b, o_t = (i_frame // T).to(tl.int64), (i_frame % T).to(tl.int64)
    return frames + o_b * s_b + o_t * s_t + o_y.to(tl.int64) * s_h + o_x.to(tl.int64) * s_w


@triton.jit
def _pixel_places(o_k, s_h, s_w, PW: tl.constexpr, DENSE: tl.constexpr):
    o_run = o_k % (PW * 3)
    return o_k // (PW * 3) * s_h + (o_run if DENSE else o_run // 3 * s_w + o_run % 3)


@triton.jit(do_not_specialize=["M"])
def patch_embed_kernel(
    frames, weight, bias, centres, out,
    M, T, GH, GW, C, s_b, s_t, s_h, s_w,
    PH: tl.constexpr, PW: tl.constexpr, DENSE: tl.constexpr, DOT: tl.constexpr,
    COUNT: tl.constexpr,  # dtype that counts patches
    KP: tl.constexpr,  # weights of a channel, filled up with zeros
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PH * PW * 3
    n_c = tl.cdiv(C, BC)  # programs of the same patches follow each other: the second-level cache has their pixels
    o_m = (tl.program_id(0) // n_c).to(COUNT) * BM + tl.arange(0, BM)
    o_c = tl.program_id(0) % n_c * BC + tl.arange(0, BC)
    # beyond the last patch and channel the last ones are read again, so that no load of the loop needs a mask
    p_m = patch_pointers(frames, tl.minimum(o_m, M - 1), T, GH, GW, s_b, s_t, s_h, s_w, PH, PW)
    p_w = weight + tl.minimum(o_c, C - 1)[:, None] * KP
    b_y = tl.zeros([BM, BC], dtype=tl.float32)
    for i_k in range(KP // BK):
        o_k = i_k * BK + tl.arange(0, BK)
        p_x = p_m[:, None] + _pixel_places(o_k, s_h, s_w, PW, DENSE)[None, :]
        if KP == K:
            b_u = tl.load(p_x)
        else:
            b_u = tl.load(p_x, mask=(o_k < K)[None, :], other=0)
        b_x = b_u.to(tl.float32) - tl.load(centres + o_k)[None, :]  # a whole number, exact in DOT
        b_w = tl.load(p_w + o_k[None, :])
        b_y += tl.dot(b_x.to(DOT), tl.trans(b_w.to(DOT)))
    m_m, m_c = o_m < M, o_c < C
    b_y = b_y * (1.0 / 256) + tl.load(bias + o_c, mask=m_c, other=0)[None, :]
    tl.store(out + o_m.to(tl.int64)[:, None] * C + o_c[None, :], b_y.to(out.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["M", "first"])
def patch_rows_kernel(
    frames, rows,
    M, first, T, GH, GW, s_b, s_t, s_h, s_w, c_0, c_1, c_2,
    PH: tl.constexpr, PW: tl.constexpr, DENSE: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = PH * PW * 3
    n_k: tl.constexpr = tl.cdiv(K, BK)
    o_m = (tl.program_id(0) // n_k).to(COUNT) * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % n_k * BK + tl.arange(0, BK)
    p_m = patch_pointers(frames, o_m + first, T, GH, GW, s_b, s_t, s_h, s_w, PH, PW)
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_u = tl.load(p_m[:, None] + _pixel_places(o_k, s_h, s_w, PW, DENSE)[None, :], mask=m_x, other=0)
    b_x = (b_u.to(tl.float32) - _of_colour(o_k, c_0, c_1, c_2)[None, :]) * (1.0 / 256)
    tl.store(rows + o_m.to(tl.int64)[:, None] * K + o_k[None, :], b_x.to(rows.dtype.element_ty), mask=m_x)


def _whole_vectors(width: int) -> bool:
    """Whether a patch's rows of pixels are read 16 bytes at a time."""
    return width * 3 % 16 == 0


def _depth(width: int) -> int:
    """Bytes of a patch that a step of the product takes: more addresses leave registers for fewer."""
    return 64 if _whole_vectors(width) else 32


def _folded_size(weight: Tensor) -> int:
    """A channel's weights, filled up with zeros for whole steps."""
    depth = _depth(weight.shape[3])
    return cdiv(weight.shape[1:].numel(), depth) * depth


def _frames(frames: Tensor, height: int, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What kernels are told of frames and patches."""
    s_b, s_t, s_h, s_w, _ = frames.stride()
    args = {
        "frames": frames, "T": frames.shape[1], "GH": frames.shape[2] // height, "GW": frames.shape[3] // width,
        "s_b": s_b, "s_t": s_t, "s_h": s_h, "s_w": s_w,
    }  # fmt: skip
    patches = frames.shape[:4].numel() // (height * width)
    count = tl.int32 if patches + 128 < 2**31 else tl.int64  # a tile may reach beyond the last
    return args, {"PH": height, "PW": width, "DENSE": s_w == 3, "COUNT": count}


def _colours(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_{i}": float(value) for i, value in enumerate(values)}


def _weights(weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What kernels are told of the weight, or of its gradient."""
    args: dict[str, Any] = dict(zip(("s_c", "s_d", "s_y", "s_x"), weight.stride()))
    args |= _colours("w", scales(std)) | _colours("r", rests(mean))
    height, width = weight.shape[2:]
    return args, {"PH": height, "PW": width, "BK": min(pow2(height * width * 3), LONGEST)}


def plan_fold(
    weight: Tensor, bias: Tensor | None, matrix: Tensor, vector: Tensor, centres: Tensor | None,
    mean: Sequence[float], std: Sequence[float],
) -> Launch:  # fmt: skip
    args, constexprs = _weights(weight, mean, std)
    args |= {"weight": weight, "bias": bias, "matrix": matrix, "vector": vector, "centres": centres}
    args |= _colours("c", centre(mean))
    return Launch(fold_kernel, len(weight), args, {**constexprs, "KP": matrix.shape[1]})


def plan_unfold(product: Tensor, sums: Tensor, grad: Tensor, mean: Sequence[float], std: Sequence[float]) -> Launch:
    args, constexprs = _weights(grad, mean, std)
    return Launch(unfold_kernel, len(grad), {**args, "product": product, "sums": sums, "grad": grad}, constexprs)


def plan_forward(
    frames: Tensor, matrix: Tensor, vector: Tensor, centres: Tensor, out: Tensor, height: int, width: int
) -> Launch:
    rows, channels = out.shape[:3].numel(), out.shape[3]
    args, constexprs = _frames(frames, height, width)
    dot = tl.float32 if dots_in_fp32(out.dtype) else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[out.dtype]
    # 256 halve the conversions of pixels for each product, where registers suffice and no more channels are filled up
    columns = 256 if _whole_vectors(width) and (channels - 1) % 256 >= 128 else 128
    args |= {"weight": matrix, "bias": vector, "centres": centres, "out": out, "M": rows, "C": channels}
    constexprs |= {"DOT": dot, "KP": matrix.shape[1], "BM": 128, "BC": columns, "BK": _depth(width)}
    return Launch(patch_embed_kernel, cdiv(rows, 128) * cdiv(channels, columns), args, constexprs, threads=256, stages=2)


def plan_rows(frames: Tensor, centre: Sequence[int], height: int, width: int, first: int, rows: Tensor) -> Launch:
    args, constexprs = _frames(frames, height, width)
    args |= _colours("c", centre) | {"rows": rows, "M": rows.shape[0], "first": first}
    programs = cdiv(rows.shape[0], 32) * cdiv(rows.shape[1], 128)
    return Launch(patch_rows_kernel, programs, args, {**constexprs, "BM": 32, "BK": 128})


def patch_rows(frames: Tensor, centre: Sequence[int], height: int, width: int, first: int, rows: Tensor) -> None:
    run(_plan_rows, (frames, rows), (tuple(centre), height, width, first))


def _plan_rows(frames: Tensor, rows: Tensor, colours: Sequence[int], height: int, width: int, first: int) -> Launch:
    return plan_rows(frames, colours, height, width, first, rows)


def fold(weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    """``fold.fold`` in one launch."""
    matrix = weight.new_empty(len(weight), weight.shape[1:].numel())
    vector = weight.new_empty(len(weight), dtype=torch.float32)
    if len(weight):
        run(plan_fold, (weight, bias, matrix, vector, None), (tuple(mean), tuple(std)))
    return matrix, vector


def unfold(product: Tensor, sums: Tensor, weight: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """``fold.unfold`` in one launch."""
    grad = empty_dense_like(weight)
    if len(weight):
        run(plan_unfold, (product, sums, grad), (tuple(mean), tuple(std)))
    return grad


def _plan(
    frames: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, mean: Sequence[float], std: Sequence[float]
) -> list[Launch]:
    size = _folded_size(weight)
    matrix = weight.new_empty(len(weight), size)
    vector, centres = (weight.new_empty(count, dtype=torch.float32) for count in (len(weight), size))
    first = plan_fold(weight, bias, matrix, vector, centres, mean, std)
    return [first, plan_forward(frames, matrix, vector, centres, out, *weight.shape[2:])]


def forward(frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> Tensor:
    """Two kernels in 16 bits, else patches gathered for PyTorch's products."""
    if weight.element_size() > 2:
        return blocks.forward(frames, weight, bias, mean, std, patch_rows, fold)
    out = blocks.empty_output(frames, weight)
    if out.numel():
        run(_plan, (frames, weight, bias, out), (tuple(mean), tuple(std)))
    return out


backward = partial(blocks.backward, gather=patch_rows, unfolded=unfold)


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's


def _aot(name: str, channels: int, side: int, kind: str, vectors: bool = True) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        frames, size, tokens = empty(64, 8, 224, 224, 3, dtype=torch.uint8), side * side * 3, (224 // side) ** 2
        weight, product = empty(channels, 3, side, side), empty(channels, size, dtype=torch.float32)
        vector = empty(channels, dtype=torch.float32)
        matrix = empty(channels, _folded_size(weight))
        centres = empty(matrix.shape[1], dtype=torch.float32)
        if kind == "rows":
            return plan_rows(frames, centre(MEAN), side, side, 16, empty(1 << 16, size))
        if kind == "fold":
            return plan_fold(weight, empty(channels), matrix, vector, centres, MEAN, STD)
        if kind == "unfold":
            return plan_unfold(product, vector, weight, MEAN, STD)
        return plan_forward(frames, matrix, vector, centres, empty(64, 8, tokens, channels), side, side)

    dtypes = (torch.float16, torch.bfloat16) if kind == "" else (torch.float32, torch.float16, torch.bfloat16)
    return Entry(f"patch_embed {kind}{kind and ' of '}{name}", launch, dtypes, dots=kind == "", vectors=vectors)


AOT = [
    _aot("ViT-B/16", 768, 16, ""),
    _aot("ViT-L/14", 1024, 14, ""),
    _aot("ViT-B/32", 768, 32, ""),
    _aot("ViT-S/16", 384, 16, ""),
    _aot("ViT-B/16", 768, 16, "rows"),
    _aot("ViT-L/14", 1024, 14, "rows", vectors=False),  # runs of 42 bytes begin at no multiple of a vector
    _aot("ViT-L/14", 1024, 14, "fold", vectors=False),  # weights and gradient lie colour by colour
    _aot("ViT-B/16", 768, 16, "unfold", vectors=False),
]
