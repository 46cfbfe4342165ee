"""Contrastive losses of texts and videos over any similarity, whose logits are never held whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..base import FLOATS, accumulate_dtype
from .processes import Pairs, gathered, shared
from .stream import KINDS, Logits, streamed

NAME = "contrastive_loss"
CHUNK = {"cpu": 4 << 20, "cuda": 256 << 20}  # bytes of logits that are held together
Parts = Tensor | Sequence[Tensor | None]


def contrastive_loss(
    text: Parts,
    video: Parts,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    similarity: Callable[..., Tensor] | None = None,
    kind: str = "softmax",
    chunk: int | None = None,
    group: Any = None,
) -> Tensor:
    """The contrastive loss of pairs of a text and a video over any similarity, with at most ``chunk x V`` logits at a time.

    With ``logits = scale * similarity(text, video) + bias`` of all texts and all videos, pairs in the same row, B of them:
    ``kind="softmax"``, symmetric InfoNCE as CLIP has it (arXiv 2103.00020, figure 3): the mean of the cross entropies of rows
    and of columns, that of each text among the videos and of each video among the texts. ``kind="sigmoid"``, SigLIP's (arXiv
    2303.15343, equation 1): ``-sum_ij log sigmoid(z_ij * logits_ij) / B``, z 1 for pairs and -1 for others.

    Where all fits one chunk this is PyTorch's own loss. Else logits come a chunk of texts at a time: forward keeps
    the log-sum-exp of rows and columns, backward computes each chunk's logits again, with autograd, under the same autocast and
    from the same random numbers.

    Under ``torch.distributed`` (more than one process in ``group``) features are gathered with gradients, and each process
    computes its own texts against all videos. Processes may have different numbers of pairs.

    Args:
        text, video: a tensor with a leading dimension of pairs, ``[B, ...]``, or several of them: features, weights, masks,
            None. Float64, float32, bfloat16 or float16 are differentiated, others (masks, say) are passed on. Any strides.
        scale: multiplies similarities: a number, or a tensor of one (as ``logit_scale.exp()``), which may have a gradient.
        bias: is added to logits, as scale; none if None.
        similarity: ``similarity(*text_part, *video_part) -> [a, v]`` of parts with a texts and v videos: an op of this package,
            a module, any function where each pair's number depends on that pair alone. None: dot products of ``[B, D]``.
            What it closes over (its parameters, say) gets gradients too, once for each call, so that DistributedDataParallel's
            hooks see them as usual; a tensor computed before is differentiated through for each chunk.
        kind: "softmax" or "sigmoid".
        chunk: so many texts at a time; None: as many as have 4 MiB of logits on a CPU, 256 MiB on a GPU.
        group: processes that share a batch; None: all of them, if there are any.

    Returns:
        A number, float32 (float64 for float64), in which all sums are kept: on every process the loss of the whole batch. The
        gradient of a process's features, and of what the similarity closes over, is as many times that of the loss as there are
        processes, so that the average over them (DDP) is the gradient for the whole batch, as with open_clip's
        ``ClipLoss(gather_with_grad=True)``; that of scale and bias is the loss's own, on every process. NaN and infinities
        pass through.

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value; a similarity of another shape than
            ``[a, v]``; processes that do not agree on shapes, dtypes and what has a gradient.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> text, video = F.normalize(torch.randn(2, 8, 32), dim=-1)
        >>> logits, pairs = 100 * text @ video.t(), torch.arange(8)
        >>> want = F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)
        >>> loss = contrastive_loss(text, video, scale=100.0, chunk=3)
        >>> torch.allclose(loss, want / 2)
        True
    """
    texts, videos = _parts("text", text), _parts("video", video)
    first = next(x for x in texts if x is not None)
    count = first.shape[0]
    for name, parts in (("text", texts), ("video", videos)):
        for i, x in enumerate(parts):
            if x is not None:
                checks.same_place(NAME, f"{name}[{i}]", x, first)
                if x.shape[0] != count:
                    raise ValueError(f"{NAME}: {name}[{i}].shape={tuple(x.shape)}, but text[0] has {count} rows, one a pair")
    if similarity is None:
        _dot_products(texts, videos)
    elif not callable(similarity):
        raise TypeError(f"{NAME}: similarity={similarity!r} must be a function, or None for dot products")
    checks.one_of(NAME, "kind", kind, KINDS)
    dtype = next((accumulate_dtype(x.dtype) for x in (*texts, *videos) if x is not None and x.dtype in FLOATS), torch.float32)
    scale, bias = _number("scale", scale, first, dtype), _number("bias", 0.0 if bias is None else bias, first, dtype)
    if chunk is not None:
        checks.integer(NAME, "chunk", chunk, low=1)
    pairs = Pairs.of(NAME, group, texts, videos, (scale, bias))
    if pairs.whole == 0:
        raise ValueError(f"{NAME}: text.shape={tuple(first.shape)}, but at least one pair is needed")
    videos = [x if x is None else gathered(x, pairs) for x in videos]
    scale, bias = shared(scale, pairs), shared(bias, pairs)
    if chunk is None:
        chunk = max(1, CHUNK.get(first.device.type, CHUNK["cuda"]) // (pairs.whole * dtype.itemsize))
    logits = Logits(similarity or dots, len(texts), dtype, first.device)
    if pairs.world == 1 and chunk >= count:
        return _at_once(logits(scale, bias, *texts, *videos), kind)
    return streamed(logits, KINDS[kind], pairs, chunk, scale, bias, texts, videos)


def dots(text: Tensor, video: Tensor) -> Tensor:
    return text @ video.t()


def _at_once(logits: Tensor, kind: str) -> Tensor:
    """Of all logits ``[B, B]``, by PyTorch's own."""
    count = len(logits)
    if kind == "sigmoid":
        signs = 2 * torch.eye(count, dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum() / count
    labels = torch.arange(count, device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _parts(name: str, value: object) -> list[Tensor | None]:
    """A tensor, or several, as a list."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, (Tensor, Sequence)):
        raise TypeError(f"{NAME}: {name} must be a tensor [B, ...] or several, got {type(value).__name__}")
    parts = [value] if isinstance(value, Tensor) else list(value)
    for i, x in enumerate(parts):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{NAME}: {name}[{i}] must be a tensor [B, ...] or None, got {type(x).__name__}")
        if x is not None and (x.layout is not torch.strided or x.dim() == 0):
            raise ValueError(f"{NAME}: {name}[{i}] must be a dense tensor [B, ...], got {x.layout} of shape {tuple(x.shape)}")
    if all(x is None for x in parts):
        raise ValueError(f"{NAME}: {name}={value!r}, but at least one tensor is needed")
    return parts


def _dot_products(texts: list[Tensor | None], videos: list[Tensor | None]) -> None:
    """Whether there are dot products of these."""
    for name, parts in (("text", texts), ("video", videos)):
        if len(parts) != 1:
            raise ValueError(f"{NAME}: {len(parts)} tensors in {name}, but without similarity one [B, D] is needed")
    assert texts[0] is not None
    checks.tensor(NAME, "text", texts[0], (None, None), "[B, D]", any_stride=True)
    checks.tensor(NAME, "video", videos[0], tuple(texts[0].shape), "[B, D]", like=texts[0], any_stride=True)


def _number(name: str, value: object, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor of no dimensions."""
    if not isinstance(value, Tensor):
        hint = " or a tensor of one" + (", or None" if name == "bias" else "")
        return torch.tensor(checks.number(NAME, name, value, hint), dtype=dtype, device=like.device)
    if value.numel() != 1 or value.dtype not in FLOATS:
        raise ValueError(f"{NAME}: {name} must be one number, got {value.dtype} of shape {tuple(value.shape)}")
    checks.same_place(NAME, name, value, like)
    return value.reshape(()).to(dtype)
