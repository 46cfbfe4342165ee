"""The op ``text_conditioned_pool``: public function, checks, registration, autograd. How it computes: README.md here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import Backend, reference_backend
from ..base import Op
from ..text_conditioned_similarity import op as similarity
from . import blocks, reference

NAME = "text_conditioned_pool"


def text_conditioned_pool(
    text: Tensor,
    video_k: Tensor,
    video_v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    target: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each video as each text sees it: the softmax over its frames of their products with the text, as X-Pool pools.

    ``out[v, a] = sum_f softmax_f(scale * <text[a], video_k[v, f]>) * video_v[v, f]`` (arXiv 2203.15086, equations 4 to 6).
    With ``target`` its cosine similarity with every pooled video, ``[A, V]``, without these in memory:
    ``text_conditioned_similarity``, which says how. For backward it keeps its inputs alone.

    Args:
        text: ``[A, D]``, float64, float32, bfloat16 or float16, last stride 1.
        video_k: ``[V, F, D]``; at least one frame.
        video_v: ``[V, F, E]``, in text's dtype, as are all.
        mask: ``[V, F]``, bool, True where valid; all frames are if None. What an invalid frame holds does not matter.
        scale: multiplies the scores; ``D ** -0.5`` if None.
        target: ``[A, E]`` or None.
        backend: "reference" or "library"; None chooses (see ``i2v_kernels.explain``).

    Returns:
        ``[V, A, E]`` in text's dtype, contiguous; zeros for a video without a valid frame. Softmax is computed in float32
        (float64 for float64). Under ``torch.autocast`` all tensors are cast like those of a matrix product. With target what
        ``text_conditioned_similarity`` returns.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, stride or device.
        NotImplementedError: the named backend cannot run this call; the text says why.

    Examples:
        >>> import torch
        >>> text, frames = torch.randn(5, 32), torch.randn(3, 12, 32)
        >>> text_conditioned_pool(text, frames, frames).shape
        torch.Size([3, 5, 32])
        >>> text_conditioned_pool(text, frames, frames, target=text).shape
        torch.Size([5, 3])
    """
    if target is not None:
        return similarity.similarities(NAME, text, video_k, video_v, target, mask, scale, backend)
    text, video_k, video_v = checks.autocast(text, video_k, video_v)  # type: ignore[assignment]
    mask, scale = similarity.checked(NAME, text, video_k, video_v, mask, scale)
    return _OP(text, video_k, video_v, mask, scale, backend=backend)


def _empty(text: Tensor, video_k: Tensor, video_v: Tensor, *_: Any) -> Tensor:
    return torch.empty((len(video_v), len(text), video_v.shape[2]), dtype=text.dtype, device=text.device)


_ARGUMENTS = "Tensor text, Tensor video_k, Tensor video_v, Tensor? mask, float scale"
_OP = Op(
    name=NAME,
    schema=f"({_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    backends=(
        reference_backend(NAME, reference.forward),
        Backend("library", lambda *args: None, blocks.forward, blocks.backward, formula=reference.forward),
    ),
    preference={"cpu": ("library",), "cuda": ("library",)},
    fake=_empty,
)
