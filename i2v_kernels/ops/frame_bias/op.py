"""The op ``frame_bias``: public function, checks, backends, autograd. How it computes: README.md beside this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, reference_backend, triton_backend
from ..base import Op
from ..temporal_attention.sdpa import finite
from . import blocks, reference

NAME = "frame_bias"
LAYOUT = "[B, T, N, H, D]"
MOST_PATCHES = 1024  # of a frame, in the Triton kernels


def frame_bias(
    q: Tensor,
    k: Tensor,
    weight_previous: Tensor,
    weight_next: Tensor,
    *,
    grid: tuple[int, int],
    prefix: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """What each patch sees where in the previous and in the next frame, as EVL learns it (arXiv 2208.03550, section 3.3).

    ``out[b, t, q] = sum_k A(t, t - 1)[q, k] * weight_previous[rel(q, k)] + A(t, t + 1)[q, k] * weight_next[rel(q, k)]`` over
    the patches, with ``A(t, u) = mean_h softmax_k(scale * <q[b, t, q, h], k[b, u, k, h]>)`` and ``rel`` the place of the query
    relative to the key: row ``(qi - ki + H - 1) * (2 * W - 1) + (qj - kj + W - 1)``. The first frame has no previous, the
    last no next one; prefix tokens get zeros. Neither the scores nor weights of every pair of patches are stored, which the
    published code gathers in each call. For backward it keeps its inputs alone.

    Args:
        q, k: ``[B, T, N, H, D]``, float64, float32, bfloat16 or float16, last stride 1; at least one head. N = prefix + H * W
            of the grid.
        weight_previous, weight_next: ``[(2 * H - 1) * (2 * W - 1), C]``, EVL's ``w1`` and ``w2``, in q's dtype.
        grid: ``(H, W)``, the patch grid.
        prefix: number of class or prompt tokens before the patches; they take no part.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        backend: "reference", "cpu" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[B, T, N, C]`` in q's dtype, its dimensions in q's order in memory. Softmax and sums are kept in float32 (float64
        for float64). Under ``torch.autocast`` all tensors are cast like those of a matrix product.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    q, k, weight_previous, weight_next = checks.autocast(q, k, weight_previous, weight_next)  # type: ignore[assignment]
    checks.tensor(NAME, "q", q, (None,) * 5, LAYOUT)
    batch, frames, tokens, heads, dim = q.shape
    checks.tensor(NAME, "k", k, (batch, frames, tokens, heads, dim), LAYOUT, like=q)
    if heads < 1:
        raise ValueError(f"{NAME}: q.shape={tuple(q.shape)}, but at least one head is needed")
    height, width = checks.sizes(NAME, "grid", grid, "H, W", low=1)
    checks.integer(NAME, "prefix", prefix, low=0)
    if prefix + height * width != tokens:
        raise ValueError(f"{NAME}: prefix={prefix} + H*W of grid={tuple(grid)} is not N={tokens}")
    places, wanted = (2 * height - 1) * (2 * width - 1), "[(2*H-1)*(2*W-1), C]"
    checks.tensor(NAME, "weight_previous", weight_previous, (places, None), wanted, like=q)
    checks.tensor(NAME, "weight_next", weight_next, (places, weight_previous.shape[1]), wanted, like=q)
    scale = max(dim, 1) ** -0.5 if scale is None else checks.number(NAME, "scale", scale, " or None")
    return _OP(q, k, weight_previous, weight_next, height, width, prefix, scale, backend=backend)


def _cpu_can_run(q: Tensor, *_: Any) -> str | None:
    return f"the tensors are on {q.device}" if q.device.type != "cpu" else None


def _triton_limits(q: Tensor, k: Tensor, *rest: Any) -> str | None:
    if q.dtype == torch.float64:
        return "float64: only reference and cpu compute in double precision"
    height, width = rest[2:4]
    if height * width > MOST_PATCHES or q.shape[-1] > 128:
        return f"grid={(height, width)}, D={q.shape[-1]}: the kernels hold at most {MOST_PATCHES} patches, D=128"
    return None


# zeros times what is not finite, where the definition has none, go through the definition
def _forward(*args: Any) -> Tensor:
    return (blocks.forward if finite(*args[2:4]) else _EXACT.forward)(*args)


def _backward(*args: Any) -> Any:
    return blocks.backward(*args) if finite(args[0], *args[3:5]) else _EXACT.backward(*args)


_EXACT = reference_backend(NAME, reference.forward)
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor weight_previous, Tensor weight_next, SymInt height, SymInt width, SymInt prefix, float scale"
)
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=(
        _EXACT,
        Backend("cpu", _cpu_can_run, _forward, _backward),
        triton_backend(NAME, _triton_limits),
    ),
    preference={"cpu": ("cpu",), "cuda": ("triton",)},
    fake=blocks.empty_output,
)
