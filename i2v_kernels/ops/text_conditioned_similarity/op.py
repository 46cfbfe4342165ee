"""The op ``text_conditioned_similarity``: public function, checks, registration, autograd. How it computes: README.md here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, reference_backend, triton_backend
from ..base import Op, accumulate_dtype
from . import blocks, reference

NAME = "text_conditioned_similarity"
MOST_FRAMES = 32  # in the Triton kernels


def text_conditioned_similarity(
    text: Tensor,
    video_k: Tensor,
    video_v: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The cosine similarity of each text's target and each video as that text sees it, in products of texts and frames alone.

    ``out[a, v] = cos(target[a], sum_f p[f] * video_v[v, f])`` with ``p = softmax_f(scale * <text[a], video_k[v, f]>)``, as
    X-Pool compares (arXiv 2203.15086, equations 4 to 8, without its layers in between; for these ``nn.TextConditionedPool``).
    Pooled videos, ``[V, A, E]``, are not computed: the numerator is ``sum_f p[f] * <target[a], video_v[v, f]>``, the squared
    length ``sum_fg p[f] * p[g] * <video_v[v, f], video_v[v, g]>``. For backward it keeps its inputs alone.

    Args:
        text: ``[A, D]``, float64, float32, bfloat16 or float16, last stride 1.
        video_k: ``[V, F, D]``; at least one frame.
        video_v: ``[V, F, E]``, in text's dtype, as are all.
        target: ``[A, E]``.
        mask: ``[V, F]``, bool, True where valid; all frames are if None. What an invalid frame holds does not matter.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        backend: "reference", "library" or "triton"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[A, V]`` float32 (float64 for float64), in which all sums are kept. A vector shorter than 1e-12 counts as zero: its
        similarity is 0, without a gradient; so it is for a video without a valid frame. Under ``torch.autocast`` all tensors
        are cast like those of a matrix product.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.

    Examples:
        >>> import torch
        >>> text, frames = torch.randn(5, 32), torch.randn(3, 12, 32)
        >>> text_conditioned_similarity(text, frames, frames, text).shape
        torch.Size([5, 3])
    """
    return similarities(NAME, text, video_k, video_v, target, mask, scale, backend)


def similarities(
    op: str, text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """The same, called by the op of that name."""
    text, video_k, video_v, target = checks.autocast(text, video_k, video_v, target)  # type: ignore[assignment]
    mask, scale = checked(op, text, video_k, video_v, mask, scale)
    checks.tensor(op, "target", target, (len(text), video_v.shape[2]), "[A, E]", like=text)
    return _OP(text, video_k, video_v, target, mask, scale, backend=backend)


def checked(
    op: str, text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor | None, float]:
    """The mask and the scale, if all fits together."""
    checks.tensor(op, "text", text, (None, None), "[A, D]")
    dim = text.shape[1]
    checks.tensor(op, "video_k", video_k, (None, None, dim), "[V, F, D]", like=text)
    videos, frames, _ = video_k.shape
    if frames < 1:
        raise ValueError(f"{op}: video_k.shape={tuple(video_k.shape)}, but at least one frame is needed")
    checks.tensor(op, "video_v", video_v, (videos, frames, None), "[V, F, E]", like=text)
    if mask is not None:
        mask = checks.mask(op, mask, "[V, F]", (videos, frames), text)
    return mask, max(dim, 1) ** -0.5 if scale is None else checks.number(op, "scale", scale, " or None")


def _empty(text: Tensor, video_k: Tensor, *_: Any) -> Tensor:
    return torch.empty((len(text), len(video_k)), dtype=accumulate_dtype(text.dtype), device=text.device)


def _triton_limits(text: Tensor, video_k: Tensor, *_: Any) -> str | None:
    if text.dtype == torch.float64:
        return "float64: only reference and library compute in double precision"
    frames = video_k.shape[1]
    return f"F={frames}: the kernels hold at most {MOST_FRAMES} frames" if frames > MOST_FRAMES else None


_ARGUMENTS = "Tensor text, Tensor video_k, Tensor video_v, Tensor target, Tensor? mask, float scale"
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=(
        reference_backend(NAME, reference.forward),
        Backend("library", lambda *args: None, blocks.forward, blocks.backward, formula=reference.forward),
        triton_backend(NAME, _triton_limits),
    ),
    preference={"cpu": ("library",), "cuda": ("triton", "library")},
    fake=_empty,
)
