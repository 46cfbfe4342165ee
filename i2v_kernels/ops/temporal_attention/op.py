"""The op ``temporal_attention``: public function, checks, backends, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..base import Op, accumulate_dtype, cpu_backend, reference_backend, triton_backend
from . import reference
from .packing import empty_grads, empty_output

NAME = "temporal_attention"
LAYOUT, PACKED = "[B, T, N, H, D]", "[B, T, N, 3, H, D]"


def temporal_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over the frames of a clip, for every clip, token and head on its own.

    ``out[b, t, n, h] = sum_s softmax_s(scale * <q[b, t, n, h], k[b, s, n, h]> + bias[h, t, s]) * v[b, s, n, h]``

    The temporal half of divided space-time attention (TimeSformer, arXiv 2102.05095, eq. 5), of AIM (2302.03024) and of
    every small transformer over frames. No permute, no copy: any strides are read in place, views of a packed QKV too.

    Args:
        q, k, v: ``[B, T, N, H, D]``, one dtype (float64, float32, bfloat16, float16), last stride 1. Or all three in one:
            ``q [B, T, N, 3, H, D]`` without k and v, the output of a packed projection; the gradient then comes packed too,
            with no stacking of three.
        bias: ``[H, T, T]`` added to the scaled scores (query frame, key frame); float32 or the dtype of q. Differentiable.
        causal: frame t attends to frames s <= t only.
        mask: ``[B, T]`` bool, True where the frame is valid as a key. A query with no valid key gives zeros.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, H, D]`` in q's dtype, its dimensions in q's order in memory. Sums are kept in float32 (float64 for
        float64). Under ``torch.autocast`` q, k, v are cast like those of ``F.scaled_dot_product_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    q, k, v = checks.autocast(q, k, v)  # type: ignore[assignment]
    if k is None and v is None:
        checks.tensor(NAME, "q", q, (None, None, None, 3, None, None), f"{PACKED} (or k and v)")
    else:
        checks.tensor(NAME, "q", q, (None,) * 5, LAYOUT)
        checks.tensor(NAME, "k", k, tuple(q.shape), LAYOUT, like=q)
        checks.tensor(NAME, "v", v, tuple(q.shape), LAYOUT, like=q)
    batch, frames, heads, dim = *q.shape[:2], *q.shape[-2:]
    if frames < 1:
        raise ValueError(f"{NAME}: q.shape={tuple(q.shape)}, but at least one frame is needed")
    if bias is not None:
        checks.tensor(NAME, "bias", bias, (heads, frames, frames), "[H, T, T]")
        checks.same_place(NAME, "bias", bias, q)
        bias = bias.to(accumulate_dtype(q.dtype)).contiguous()
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = getattr(mask, "dtype", mask)
            raise TypeError(f"{NAME}: mask must be a bool tensor [B, T], True where valid, got {got!r}")
        if mask.shape != (batch, frames):
            raise ValueError(f"{NAME}: mask.shape={tuple(mask.shape)}, but [B, T] = {(batch, frames)} is needed")
        checks.same_place(NAME, "mask", mask, q)
        mask = mask.contiguous()
    if not isinstance(causal, bool):
        raise TypeError(f"{NAME}: causal={causal!r} must be a bool")
    if scale is None:
        scale = 1.0 / math.sqrt(max(dim, 1))
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{NAME}: scale={scale!r} must be a number or None")
    return _OP(q, k, v, bias, mask, float(scale), causal, backend=backend)


def _triton_limits(q: Tensor, *_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "float64: only reference and cpu compute in double precision"
    if q.shape[1] > 128 or q.shape[-1] > 256:
        return f"T={q.shape[1]}, D={q.shape[-1]}: the kernel holds at most T=128, D=256"
    return None


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    q, k, v, bias, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, bias, mask)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, mask = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _OP.backward_op(grad, q, k, v, bias, mask, ctx.scale, ctx.causal, bias_grad, ctx.backend)
    if k is None:
        dk = dv = None
    return dq, dk, dv, dbias if bias_grad else None, None, None, None


_OP = Op(
    name=NAME,
    schema="(Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, float scale, bool causal) -> Tensor",
    backward_schema="(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, float scale, bool causal, "
    "bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=(
        reference_backend(reference.forward, differentiable=(0, 1, 2, 3), empty=empty_output),
        cpu_backend(NAME),
        triton_backend(NAME, _triton_limits),
    ),
    preference={"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
    fake=empty_output,
    fake_backward=empty_grads,
    save=_save,
    gradients=_gradients,
)
