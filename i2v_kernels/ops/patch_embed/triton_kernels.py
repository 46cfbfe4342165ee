"""Triton kernels of ``patch_embed`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import Entry, Launch, cdiv, dots_in_fp32
from ..triton_launch import run
from . import blocks
from .fold import centre, fold

DEPTH = 64  # bytes of a patch that a step of the product takes


@triton.jit
def patch_pointers(frames, o_m, T, GH, GW, s_b, s_t, s_h, s_w, PH: tl.constexpr, PW: tl.constexpr):
    """Where patches begin."""
    i_line = o_m // GW
    i_frame = i_line // GH
    o_y, o_x = (i_line % GH) * PH, (o_m % GW) * PW
    return frames + (i_frame // T) * s_b + (i_frame % T) * s_t + o_y * s_h + o_x * s_w


@triton.jit
def load_pixels(p_m, m_m, o_k, K, s_h, s_w, c_0, c_1, c_2, PW: tl.constexpr, DENSE: tl.constexpr, DOT: tl.constexpr):
    """(pixel - centre) / 256 of patches [BM] at places [BK] in them, exact in DOT."""
    o_run = o_k % (PW * 3)
    o_p = o_k // (PW * 3) * s_h + (o_run if DENSE else o_run // 3 * s_w + o_run % 3)
    b_u = tl.load(p_m[:, None] + o_p[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0)
    i_c = o_k % 3
    b_centre = tl.where(i_c == 0, c_0, tl.where(i_c == 1, c_1, c_2)).to(tl.float32)
    return ((b_u.to(tl.float32) - b_centre[None, :]) * (1.0 / 256)).to(DOT)


@triton.jit
def patch_embed_kernel(
    frames, weight, bias, out,
    M, T, GH, GW, C, K, s_b, s_t, s_h, s_w, s_k, c_0, c_1, c_2,
    PH: tl.constexpr, PW: tl.constexpr, DENSE: tl.constexpr, DOT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n_c = tl.cdiv(C, BC)  # programs of the same patches follow each other: the second-level cache has their pixels
    o_m = tl.program_id(0).to(tl.int64) // n_c * BM + tl.arange(0, BM)
    o_c = tl.program_id(0) % n_c * BC + tl.arange(0, BC)
    m_m, m_c = o_m < M, o_c < C
    p_m = patch_pointers(frames, o_m, T, GH, GW, s_b, s_t, s_h, s_w, PH, PW)
    b_y = tl.zeros([BM, BC], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        o_k = i_k * BK + tl.arange(0, BK)
        b_x = load_pixels(p_m, m_m, o_k, K, s_h, s_w, c_0, c_1, c_2, PW, DENSE, DOT)
        b_w = tl.load(weight + o_c[:, None] * s_k + o_k[None, :], mask=m_c[:, None], other=0)  # zeros beyond K
        b_y += tl.dot(b_x, tl.trans(b_w.to(DOT)))
    b_y += tl.load(bias + o_c, mask=m_c, other=0)[None, :]
    tl.store(out + o_m[:, None] * C + o_c[None, :], b_y.to(out.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


@triton.jit
def patch_rows_kernel(
    frames, rows,
    M, first, T, GH, GW, K, s_b, s_t, s_h, s_w, c_0, c_1, c_2,
    PH: tl.constexpr, PW: tl.constexpr, DENSE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n_k = tl.cdiv(K, BK)
    o_m = tl.program_id(0).to(tl.int64) // n_k * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % n_k * BK + tl.arange(0, BK)
    p_m = patch_pointers(frames, o_m + first, T, GH, GW, s_b, s_t, s_h, s_w, PH, PW)
    b_x = load_pixels(p_m, o_m < M, o_k, K, s_h, s_w, c_0, c_1, c_2, PW, DENSE, tl.float32)
    p_rows = rows + o_m[:, None] * K + o_k[None, :]
    tl.store(p_rows, b_x.to(rows.dtype.element_ty), mask=(o_m < M)[:, None] & (o_k < K)[None, :])


def _arguments(frames: Tensor, centre: Sequence[int], height: int, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both kernels are told of frames and patches."""
    s_b, s_t, s_h, s_w, _ = frames.stride()
    args = {
        "frames": frames, "T": frames.shape[1], "GH": frames.shape[2] // height, "GW": frames.shape[3] // width,
        "K": height * width * 3, "s_b": s_b, "s_t": s_t, "s_h": s_h, "s_w": s_w,
        "c_0": float(centre[0]), "c_1": float(centre[1]), "c_2": float(centre[2]),
    }  # fmt: skip
    return args, {"PH": height, "PW": width, "DENSE": s_w == 3}


def plan_forward(
    frames: Tensor, matrix: Tensor, vector: Tensor, out: Tensor, centre: Sequence[int], height: int, width: int
) -> Launch:
    rows, channels = out.shape[:3].numel(), out.shape[3]
    args, constexprs = _arguments(frames, centre, height, width)
    dot = tl.float32 if dots_in_fp32(out.dtype) else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[out.dtype]
    return Launch(
        patch_embed_kernel,
        cdiv(rows, 128) * cdiv(channels, 128),
        {**args, "weight": matrix, "bias": vector, "out": out, "M": rows, "C": channels, "s_k": matrix.stride(0)},
        {**constexprs, "DOT": dot, "BM": 128, "BC": 128, "BK": DEPTH},
        threads=256,
        stages=2,
    )


def plan_rows(frames: Tensor, centre: Sequence[int], height: int, width: int, first: int, rows: Tensor) -> Launch:
    args, constexprs = _arguments(frames, centre, height, width)
    programs = cdiv(rows.shape[0], 32) * cdiv(rows.shape[1], 128)
    return Launch(
        patch_rows_kernel,
        programs,
        {**args, "rows": rows, "M": rows.shape[0], "first": first},
        {**constexprs, "BM": 32, "BK": 128},
    )


def patch_rows(frames: Tensor, centre: Sequence[int], height: int, width: int, first: int, rows: Tensor) -> None:
    run(_plan_rows, (frames, rows), (tuple(centre), height, width, first))


def _plan_rows(frames: Tensor, rows: Tensor, colours: Sequence[int], height: int, width: int, first: int) -> Launch:
    return plan_rows(frames, colours, height, width, first, rows)


def forward(frames: Tensor, weight: Tensor, bias: Tensor | None, mean: list[float], std: list[float]) -> Tensor:
    """One kernel in 16 bits, else patches gathered for PyTorch's products."""
    if weight.element_size() > 2:
        return blocks.forward(frames, weight, bias, mean, std, patch_rows)
    out = blocks.empty_output(frames, weight)
    if out.numel():
        matrix, vector = fold(weight, bias, mean, std, DEPTH)
        run(plan_forward, (frames, matrix, vector, out), (tuple(centre(mean)), *weight.shape[2:]))
    return out


backward = partial(blocks.backward, gather=patch_rows)


def _aot(name: str, channels: int, side: int, dots: bool) -> Entry:
    def launch(dtype: torch.dtype) -> Launch:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        frames, size, tokens = empty(64, 8, 224, 224, 3, dtype=torch.uint8), side * side * 3, (224 // side) ** 2
        if not dots:
            return plan_rows(frames, [123, 117, 104], side, side, 16, empty(1 << 16, size))
        bias = empty(channels, dtype=torch.float32)
        matrix = empty(channels, cdiv(size, DEPTH) * DEPTH)
        return plan_forward(frames, matrix, bias, empty(64, 8, tokens, channels), [123, 117, 104], side, side)

    dtypes = (torch.float16, torch.bfloat16) if dots else (torch.float32, torch.float16, torch.bfloat16)
    # runs of 14 pixels are 42 bytes: their rows are no multiple of a vector
    return Entry(f"patch_embed {name}", launch, dtypes, dots=dots, vectors=dots or side != 14)


AOT = [
    _aot("ViT-B/16", 768, 16, dots=True),
    _aot("ViT-L/14", 1024, 14, dots=True),
    _aot("ViT-B/32", 768, 32, dots=True),
    _aot("rows of ViT-B/16", 768, 16, dots=False),
    _aot("rows of ViT-L/14", 1024, 14, dots=False),
]
