"""The op ``video_cross_attention``: public function, checks, backends, autograd. Kernels: see README.md beside this file."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, cpu_backend, reference_backend, triton_backend
from ..base import Op, accumulate_dtype
from ..layout import empty_dense_like
from . import reference, sdpa

NAME = "video_cross_attention"
QUERIES, KEYS = "[B, Q, H, D]", "[B, T, N, H, D]"


@overload
def video_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def video_cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def video_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of a few queries to all tokens of all frames of their clip.

    ``out[b, i, h] = sum_{t, n} softmax_{t, n}(scale * <q[b, i, h], k[b, t, n, h]>) * v[b, t, n, h]``

    The read-out of EVL's decoder (arXiv 2208.03550, eq. 2), of UniFormerV2's global block (2211.09552, eq. 7 to 9) and of
    attention pooling: most often one query for a clip. Keys and values are read where a backbone left them, by any strides:
    frame by frame, sequence-first, slices of a packed projection. Frames and tokens are never brought together by a copy.

    Args:
        q: ``[B, Q, H, D]``; float64, float32, bfloat16 or float16, last stride 1.
        k, v: ``[B, T, N, H, D]``, of q's dtype, last stride 1.
        mask: ``[B, T]`` bool, True where the frame is valid as keys. A query with no valid key gives zeros.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        return_lse: return ``(out, lse)`` with ``lse [B, Q, H]``, the logarithm of each query's sum of exponentials of scores,
            -inf where no key is valid; float32 (float64 for float64), not differentiable.
        backend: "reference", "sdpa", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, Q, H, D]`` in q's dtype, its dimensions in q's order in memory. Sums are kept in float32 (float64 for
        float64). Under ``torch.autocast`` q, k, v are cast like those of ``F.scaled_dot_product_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call, and the text says why.

    Examples:
        >>> import torch
        >>> q, (k, v) = torch.randn(2, 1, 12, 64), torch.randn(2, 2, 8, 197, 12, 64)
        >>> video_cross_attention(q, k, v).shape
        torch.Size([2, 1, 12, 64])
    """
    q, k, v = checks.autocast(q, k, v)  # type: ignore[assignment]
    checks.tensor(NAME, "q", q, (None,) * 4, QUERIES)
    batch, _, heads, dim = q.shape
    checks.tensor(NAME, "k", k, (batch, None, None, heads, dim), KEYS, like=q)
    checks.tensor(NAME, "v", v, tuple(k.shape), KEYS, like=q)
    frames = k.shape[1]
    if frames < 1:
        raise ValueError(f"{NAME}: k.shape={tuple(k.shape)}, but at least one frame is needed")
    if mask is not None:
        mask = checks.mask(NAME, mask, "[B, T]", (batch, frames), q)
    checks.flag(NAME, "return_lse", return_lse)
    if scale is None:
        scale = 1.0 / math.sqrt(max(dim, 1))
    else:
        scale = checks.number(NAME, "scale", scale, " or None")
    out, sums = _OP(q, k, v, mask, scale, backend=backend, prefer="sdpa" if sdpa.pays(q) else "")
    return (out, log_sum_exp(sums)) if return_lse else out


def log_sum_exp(sums: Tensor) -> Tensor:
    """``[B, Q, H]`` of what the op returns beside its output, ``[B, Q, H, 2]``: a number m of each query, its largest score or
    one near it, and the sum of exp(score - m). Apart they give probabilities to the last digit, which their sum does not.
    Where no key is valid m is -inf and the sum 1.
    """
    most, total = sums.unbind(-1)
    return torch.where(most == math.inf, most, most + total.log())


def empty_output(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Memory for the output and for ``[B, Q, H, 2]``, see ``log_sum_exp``."""
    return empty_dense_like(q), torch.empty((*q.shape[:3], 2), dtype=accumulate_dtype(q.dtype), device=q.device)


def empty_grads(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients, empty where the last argument does not want them."""
    dq, dk, dv = (empty_dense_like(x) if want else grad.new_empty(0) for x, want in zip((q, k, v), rest[-1]))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *result)
    ctx.rest = inputs[4:5]


_DEFINED = reference_backend(NAME, reference.forward)


def _sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> Any:
    out = rest[3]
    return (sdpa.backward if sdpa.suits(q, k, grad, out) else _DEFINED.backward)(grad, q, k, *rest)


def _triton_limits(q: Tensor, *_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "float64: only reference, sdpa and cpu compute in double precision"
    return f"D={q.shape[-1]}: the kernel holds at most D=256" if q.shape[-1] > 256 else None


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale"
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor sums, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    backends=(
        _DEFINED,
        Backend("sdpa", sdpa.can_run, sdpa.forward, _sdpa_backward, formula=reference.forward),
        cpu_backend(NAME),
        triton_backend(NAME, _triton_limits),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=empty_output,
    fake_backward=empty_grads,
    save=_save,
)
