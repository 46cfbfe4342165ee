"""Triton kernels of ``text_conditioned_similarity`` and their launchers. How they work and why: README.md beside this file."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED
from ..triton_common import Entry, Launch, cdiv, pow2
from ..triton_launch import run
from . import blocks
from .reference import EPS

TILE = 1024  # numbers: frames by texts


@triton.jit
def shares_of(scores, mask, i_v, o_p, m_p, o_f, F, scale):
    """Probabilities ``[FP, BA]`` of a video's frames; ``o_p``, ``m_p``: where its numbers are, and which there are."""
    b_s = tl.load(scores + o_p, mask=m_p, other=0.0).to(tl.float32) * scale
    m_f = o_f < F
    if mask is not None:
        valid = m_f & (tl.load(mask + i_v * F + o_f, mask=m_f, other=0) != 0)
        # of a video without a valid frame all are looked at, which are zeros
        m_f = tl.where(tl.max(valid.to(tl.int32), 0) > 0, valid, m_f)
    b_s = tl.where(m_f[:, None], b_s, float("-inf"))
    b_p = tl.exp(b_s - tl.max(b_s, 0)[None, :])
    return b_p / tl.sum(b_p, 0)[None, :]


@triton.jit
def gram_of(gram, i_v, o_f, F):
    o_g = i_v * F * F + o_f[:, None] * F + o_f[None, :]
    return tl.load(gram + o_g, mask=(o_f < F)[:, None] & (o_f < F)[None, :], other=0.0)


# how many texts there are is not known beforehand, so numbers are read one by one, a warp's side by side
@triton.jit(do_not_specialize=["A", "s_oa", "s_ov"])
def text_conditioned_similarity_kernel(
    scores, products, gram, mask, out, A, F, scale, s_oa, s_ov, LEAST: tl.constexpr, PRECISION: tl.constexpr,
    FP: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_a, i_v = i_p % tl.cdiv(A, BA), (i_p // tl.cdiv(A, BA)).to(tl.int64)
    o_a, o_f = i_a * BA + tl.arange(0, BA), tl.arange(0, FP)
    m_p = (o_f < F)[:, None] & (o_a < A)[None, :]
    o_p = (i_v * F + o_f)[:, None] * A + o_a[None, :]
    b_p = shares_of(scores, mask, i_v, o_p, m_p, o_f, F, scale)
    b_w = tl.load(products + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_u = tl.dot(gram_of(gram, i_v, o_f, F), b_p, input_precision=PRECISION)
    b_sq = tl.sum(b_p * b_u, 0)
    b_r = tl.where(b_sq <= LEAST, 0.0, 1.0 / tl.sqrt(b_sq))
    b_o = tl.sum(b_p * b_w, 0) * b_r
    tl.store(out + o_a.to(tl.int64) * s_oa + i_v * s_ov, b_o, mask=o_a < A)


@triton.jit(do_not_specialize=["A", "s_ga", "s_gv"])
def text_conditioned_similarity_backward_kernel(
    g, scores, products, gram, mask, ds, dw, shares, squares, along, A, F, scale, s_ga, s_gv,
    LEAST: tl.constexpr, PRECISION: tl.constexpr, FP: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0)
    i_a, i_v = i_p % tl.cdiv(A, BA), (i_p // tl.cdiv(A, BA)).to(tl.int64)
    o_a, o_f = i_a * BA + tl.arange(0, BA), tl.arange(0, FP)
    m_p = (o_f < F)[:, None] & (o_a < A)[None, :]
    o_p = (i_v * F + o_f)[:, None] * A + o_a[None, :]
    b_p = shares_of(scores, mask, i_v, o_p, m_p, o_f, F, scale)
    b_w = tl.load(products + o_p, mask=m_p, other=0.0).to(tl.float32)
    b_u = tl.dot(gram_of(gram, i_v, o_f, F), b_p, input_precision=PRECISION)
    b_sq, b_n = tl.sum(b_p * b_u, 0), tl.sum(b_p * b_w, 0)
    b_r = tl.where(b_sq <= LEAST, 0.0, 1.0 / tl.sqrt(b_sq))
    b_dn = tl.load(g + o_a.to(tl.int64) * s_ga + i_v * s_gv, mask=o_a < A, other=0.0).to(tl.float32) * b_r
    b_dq = b_dn * b_n * b_r * b_r
    if along is not None:
        tl.store(along + i_v * A + o_a, b_dn * b_n, mask=o_a < A)
    if dw is not None:
        tl.store(dw + o_p, (b_p * b_dn[None, :]).to(dw.dtype.element_ty), mask=m_p)
    if squares is not None:
        tl.store(shares + o_p, b_p, mask=m_p)
        tl.store(squares + o_p, b_p * b_dq[None, :], mask=m_p)
    if ds is not None:
        b_dp = b_w * b_dn[None, :] - b_u * b_dq[None, :]
        b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 0)[None, :]) * scale
        tl.store(ds + o_p, b_ds.to(ds.dtype.element_ty), mask=m_p)


def _launch(
    kernel: Any, scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, scale: float, **args: Any
) -> Launch:
    videos, frames, texts = scores.shape
    padded = max(pow2(frames), 16)  # that a product of tiles takes
    width = TILE // padded
    given: dict[str, Any] = {
        "scores": scores,
        "products": products,
        "gram": gram,
        "mask": None if mask is None else mask.view(torch.uint8),
    }
    given |= {**args, "A": texts, "F": frames, "scale": float(scale)}
    # where inputs are of 16 bits products of float32 are those of three bfloat16 each, which matrix instructions make
    precision = "ieee" if scores.dtype == torch.float32 or INTERPRETED else "bf16x6"
    constexprs = {"LEAST": EPS**2, "PRECISION": precision, "FP": padded, "BA": width}
    return Launch(kernel, videos * cdiv(texts, width), given, constexprs, 128 * padded // 16)


def plan(scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, out: Tensor, scale: float) -> Launch:
    steps = {"s_oa": out.stride(0), "s_ov": out.stride(1)}
    return _launch(text_conditioned_similarity_kernel, scores, products, gram, mask, scale, out=out, **steps)


def plan_backward(
    g: Tensor, scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, ds: Tensor | None, dw: Tensor | None,
    shares: Tensor | None, squares: Tensor | None, along: Tensor | None, scale: float,
) -> Launch:  # fmt: skip
    into = {"ds": ds, "dw": dw, "shares": shares, "squares": squares, "along": along}
    steps = {"s_ga": g.stride(0), "s_gv": g.stride(1)}
    kernel = text_conditioned_similarity_backward_kernel
    return _launch(kernel, scores, products, gram, mask, scale, g=g, **into, **steps)


class Pairs:
    """As ``blocks.Pairs``."""

    @staticmethod
    def forward(scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
        run(plan, (scores, products, gram, mask, out), (scale,))

    @staticmethod
    def backward(
        grad: Tensor, scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, scale: float, wanted: list[bool]
    ) -> blocks.Gradients:
        ds = torch.empty_like(scores) if wanted[0] or wanted[1] else None
        dw = torch.empty_like(products) if wanted[2] or wanted[3] else None
        shares, squares = (torch.empty_like(scores, dtype=torch.float32) if wanted[2] else None for _ in range(2))
        along = torch.empty_like(scores[:, 0], dtype=torch.float32) if wanted[3] else None
        run(plan_backward, (grad, scores, products, gram, mask, ds, dw, shares, squares, along), (scale,))
        of_scores, of_products = (None if x is None else x.flatten(0, 1) for x in (ds, dw))
        of_gram = None if shares is None or squares is None else torch.bmm(squares, shares.transpose(1, 2)).neg_()
        return blocks.Gradients(of_scores, of_products, of_gram, None if along is None else along.sum(0))


def _pairs(text: Tensor, video_k: Tensor) -> Any:
    """Of nothing there are no kernels."""
    return Pairs if text.numel() > 0 and video_k.numel() > 0 else blocks.Pairs


def forward(text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return blocks.forward(text, video_k, video_v, target, mask, scale, _pairs(text, video_k))


def backward(
    grad: Tensor, text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return blocks.backward(grad, text, video_k, video_v, target, mask, scale, wanted, _pairs(text, video_k))


def _entry(frames: int, masked: bool, backward: bool, alone: bool, dtype: torch.dtype) -> Launch:
    scores = torch.empty(64, frames, 256, dtype=dtype, device="meta")
    gram = torch.empty(64, frames, frames, device="meta")
    mask = torch.empty(64, frames, dtype=torch.bool, device="meta") if masked else None
    out = torch.empty(256, 64, device="meta")
    if not backward:
        return plan(scores, torch.empty_like(scores), gram, mask, out, 0.05)
    ds, products = torch.empty_like(scores), torch.empty_like(scores)
    if alone:
        return plan_backward(out, scores, products, gram, mask, ds, None, None, None, None, 0.05)
    shares, squares, along = (torch.empty(64, frames, 256, device="meta") for _ in range(3))
    return plan_backward(out, scores, products, gram, mask, ds, torch.empty_like(scores), shares, squares, along, 0.05)


def _one(backward: bool, dtype: torch.dtype) -> Launch:
    scores = torch.empty(1, 1, 1, dtype=dtype, device="meta")
    out = torch.empty(1, 1, device="meta")
    mask = torch.empty(1, 1, dtype=torch.bool, device="meta")
    if backward:
        return plan_backward(out, scores, scores, out[None], mask, scores, scores, out[None], out[None], out, 1.0)
    return plan(scores, scores, out[None], mask, out, 1.0)


def _entries(frames: int, masked: bool = False, alone: bool = False) -> list[Entry]:
    name = f"F{frames}{' masked' * masked}{', dtext alone' * alone}"
    return [
        Entry(
            f"text_conditioned_similarity {'backward ' * back}{name}",
            partial(_entry, frames, masked, back, alone),
            vectors=False,
        )
        for back in ((True,) if alone else (False, True))
    ]


AOT = [
    *_entries(12, masked=True),
    *_entries(12, alone=True),
    *_entries(32),
    # sizes and strides of 1 become constants, which not all of Triton's operations take
    Entry("text_conditioned_similarity, all sizes 1", partial(_one, False), (torch.bfloat16,), False, False),
    Entry("text_conditioned_similarity backward, all sizes 1", partial(_one, True), (torch.bfloat16,), False, False),
]
