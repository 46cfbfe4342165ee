"""The op ``temporal_attention``: public function, checks, backends, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, cpu_backend, reference_backend, triton_backend
from ..base import Op, accumulate_dtype
from ..token_shift.op import MAX_GROUPS
from . import cuda, reference, sdpa
from .packing import empty_grads, empty_output

NAME = "temporal_attention"
LAYOUT, KEYS, PACKED = "[B, T, N, H, D]", "[B, Tk, N, H, D]", "[B, T, N, 3, H, D]"
LONGEST = 128  # frames; the kernels are made for short clips


@overload
def temporal_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, bias: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., mask: Tensor | None = ..., scale: float | None = ...,
    offsets: Sequence[int] | None = ..., dropout: float = ..., return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def temporal_attention(
    q: Tensor, k: Tensor | None = ..., v: Tensor | None = ..., *, bias: Tensor | None = ..., causal: bool = ...,
    window: tuple[int | None, int | None] | None = ..., mask: Tensor | None = ..., scale: float | None = ...,
    offsets: Sequence[int] | None = ..., dropout: float = ..., return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def temporal_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    offsets: Sequence[int] | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the frames of a clip, for every clip, token and head on its own.

    ``out[b, t, n, h] = sum_s softmax_s(scale * <q[b, t, n, h], k[b, s, n, h]> + bias[h, t, s]) * v[b, s, n, h]``

    The temporal half of divided space-time attention (TimeSformer, arXiv 2102.05095, eq. 5), of AIM (2302.03024) and of
    every small transformer over frames. No permute, no copy: any strides are read in place, views of a packed QKV too.
    Beyond 128 frames it runs ``F.scaled_dot_product_attention`` on strided views, clip after clip.

    Args:
        q, k, v: ``[B, T, N, H, D]``, one dtype (float64, float32, bfloat16, float16), last stride 1; k and v may have another
            number of frames ``Tk`` than q. Or all three in one: ``q [B, T, N, 3, H, D]`` without k and v, the output of a
            packed projection; the gradient then comes packed too, with no stacking of three.
        bias: ``[H, T, Tk]`` added to the scaled scores (query frame, key frame); float32 or the dtype of q. Differentiable.
        causal: frame t attends to frames s <= t only. If k has more or fewer frames than q, the last ones are at one time,
            as in flash-attn: s <= t + Tk - T.
        window: ``(left, right)`` frames: t attends to ``t - left <= s <= t + right`` only, aligned as for ``causal``; None or
            -1 in either place is no limit. With ``causal`` the right limit is 0.
        mask: ``[B, Tk]`` bool, True where the frame is valid as a key. A query with no valid key gives zeros.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        offsets: one number of frames for each head: where ``k[b, s]`` and ``v[b, s]`` stand above, head h reads frame
            ``s + offsets[h]``, or the clip's first or last frame where that lies outside (ZeroI2V, arXiv 2310.01324: -1 is the
            previous frame). ``mask`` then speaks of the frame read.
        dropout: only 0: dropping probabilities out is neither exact nor reproducible across backends.
        return_lse: return ``(out, lse)`` with ``lse [B, T, N, H]``, the logarithm of each query's sum of exponentials of
            scores, -inf where no key is valid; float32 (float64 for float64), not differentiable.
        backend: "reference", "sdpa", "cpu", "triton" or "cuda"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, H, D]`` in q's dtype, its dimensions in q's order in memory. Sums are kept in float32 (float64 for
        float64). Under ``torch.autocast`` q, k, v are cast like those of ``F.scaled_dot_product_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: dropout; the named backend cannot run this call, and the text says why.
    """
    q, k, v = checks.autocast(q, k, v)  # type: ignore[assignment]
    if k is None and v is None:
        checks.tensor(NAME, "q", q, (None, None, None, 3, None, None), f"{PACKED} (or k and v)")
        keys = q.shape[1]
    else:
        checks.tensor(NAME, "q", q, (None,) * 5, LAYOUT)
        batch, _, tokens, heads, dim = q.shape
        checks.tensor(NAME, "k", k, (batch, None, tokens, heads, dim), KEYS, like=q)
        checks.tensor(NAME, "v", v, tuple(k.shape), KEYS, like=q)  # type: ignore[union-attr]
        keys = k.shape[1]  # type: ignore[union-attr]
    batch, frames, heads, dim = *q.shape[:2], *q.shape[-2:]
    if frames < 1:
        raise ValueError(f"{NAME}: q.shape={tuple(q.shape)}, but at least one frame is needed")
    if keys < 1:
        raise ValueError(f"{NAME}: k.shape={tuple(k.shape)}, but at least one frame is needed")  # type: ignore[union-attr]
    if bias is not None:
        checks.tensor(NAME, "bias", bias, (heads, frames, keys), "[H, T, Tk]")
        checks.same_place(NAME, "bias", bias, q)
        bias = bias.to(accumulate_dtype(q.dtype)).contiguous()
    if mask is not None:
        mask = checks.mask(NAME, mask, "[B, Tk]", (batch, keys), q)
    checks.flag(NAME, "causal", causal)
    checks.flag(NAME, "return_lse", return_lse)
    left, right = check_window(NAME, window)
    if causal:
        right = 0
    if scale is None:
        scale = 1.0 / math.sqrt(max(dim, 1))
    else:
        scale = checks.number(NAME, "scale", scale, " or None")
    if offsets is not None:
        offsets = [min(max(offset, -keys), keys) for offset in check_offsets(NAME, offsets, heads)]
    if checks.number(NAME, "dropout", dropout) != 0:
        raise NotImplementedError(
            f"{NAME}: dropout={dropout!r}: dropping probabilities out is not supported, since no two backends would drop the "
            "same; pass 0 and drop the output instead"
        )
    arguments = (q, k, v, bias, mask, offsets, scale, left, right, return_lse)
    out, lse = _OP(*arguments, backend=backend, prefer="sdpa" if frames > LONGEST or keys > LONGEST else "")
    return (out, lse) if return_lse else out


def check_window(op: str, window: object) -> tuple[int, int]:
    """``(left, right)`` as the registered op takes them, -1 for no limit."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window={window!r} must be a pair (left, right) or None")
    left, right = (
        -1 if limit is None else min(checks.integer(op, f"window[{i}]", limit, low=-1), checks.LARGEST)
        for i, limit in enumerate(window)
    )
    return left, right


def check_offsets(op: str, offsets: object, heads: int) -> list[int]:
    """One int for each head."""
    found = checks.items(op, "offsets", offsets, "a list of one int for each head, or None")
    found = [checks.integer(op, f"offsets[{h}]", offset) for h, offset in enumerate(found)]
    if len(found) != heads:
        raise ValueError(f"{op}: offsets={offsets!r} has {len(found)} numbers, but there are H={heads} heads")
    return found


def _triton_limits(q: Tensor, k: Tensor | None, *rest: Any) -> str | None:
    if q.dtype == torch.float64:
        return "float64: only reference, sdpa and cpu compute in double precision"
    keys = q.shape[1] if k is None else k.shape[1]
    if q.shape[1] > LONGEST or keys > LONGEST or q.shape[-1] > 256:
        return f"T={q.shape[1]}, Tk={keys}, D={q.shape[-1]}: the kernel holds at most T={LONGEST}, D=256"
    offsets = rest[3]
    if offsets is not None and (runs := sum(1 for _ in itertools.groupby(offsets))) > MAX_GROUPS:
        return f"offsets of {runs} runs of heads: the kernels take at most {MAX_GROUPS}"
    return None


def _sdpa_can_run(*args: Any) -> str | None:
    return "it returns no log-sum-exp" if args[-1] else None


_SDPA = reference_backend(NAME, sdpa.forward, name="sdpa", can_run=_sdpa_can_run, formula=sdpa.by_products)
_EXACT = reference_backend(NAME, sdpa.clip_after_clip)


def _sdpa_backward(grad: Tensor, *args: Any) -> Any:
    return (_SDPA if sdpa.finite(grad) else _EXACT).backward(grad, *args)


def _save(ctx: Any, inputs: tuple[Any, ...], _: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:9]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bias, mask = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _OP.derive(grad, q, k, v, bias, mask, *ctx.rest, bias_grad, ctx.backend)
    if k is None:
        dk = dv = None
    return dq, dk, dv, dbias if bias_grad else None, None, None, None, None, None, None


_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, int[]? offsets, float scale, SymInt left, SymInt right"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}, bool want_lse) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=(
        reference_backend(NAME, reference.forward),
        replace(_SDPA, backward=_sdpa_backward),
        cpu_backend(NAME),
        triton_backend(NAME, _triton_limits),
        Backend("cuda", cuda.can_run, cuda.forward, cuda.backward),
    ),
    by_name_only={"cuda": "not yet verified on a GPU (proof step 7): ask for it by name"},
    preference={"cpu": ("cpu",), "cuda": ("triton", "sdpa")},
    fake=empty_output,
    fake_backward=empty_grads,
    save=_save,
    gradients=_gradients,
    forward_args=lambda args, count: (*args[1:count], False),
)
