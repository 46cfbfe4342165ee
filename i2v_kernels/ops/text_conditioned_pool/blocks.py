"""``text_conditioned_pool`` by PyTorch's matrix products, a few videos at a time.

Probabilities are ``[videos, F, texts]``, texts innermost: they are the products of all frames' keys with all texts, as they
come, and sums over frames run along vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..layout import empty_dense_like
from ..products import add_product, as_rows, block_count


class Videos:
    """Some videos' keys and values, zeros for frames that are not valid."""

    def __init__(self, places: slice, video_k: Tensor, video_v: Tensor, mask: Tensor | None) -> None:
        self.places, self.mask = places, None if mask is None else mask[places]
        self.k, self.v = (x[places] if mask is None else self.valid(x[places]) for x in (video_k, video_v))

    def valid(self, x: Tensor) -> Tensor:
        """``[videos, F, ...]`` with zeros for frames that are not."""
        return x if self.mask is None else x.masked_fill(~self.mask[:, :, None], 0)

    def __len__(self) -> int:
        return len(self.k)

    def products(self, x: Tensor, rows: Tensor) -> Tensor:
        """``[videos, F, texts]`` of all frames ``x [videos, F, D]`` and ``rows [texts, D]``."""
        return torch.mm(as_rows(x), rows.t()).view(len(x), x.shape[1], len(rows))


def probabilities(scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``[videos, F, texts]`` in the dtype of sums, of products, which may be overwritten, and ``mask [videos, F]``."""
    scores = scores.to(accumulate_dtype(scores.dtype)).mul_(scale)
    if mask is not None:  # of a video without a valid frame all are looked at, which are zeros
        scores.masked_fill_((mask.any(1, keepdim=True) & ~mask)[:, :, None], float("-inf"))
    return torch.softmax(scores, 1)


def videos_of(text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None, bytes_each: int) -> Iterator[Videos]:
    """As many videos as have a block's bytes, so many each."""
    step = block_count(text.device, bytes_each)
    for first in range(0, len(video_k), step):
        yield Videos(slice(first, min(first + step, len(video_k))), video_k, video_v, mask)


def softmax_gradient(probabilities: Tensor, grad: Tensor, scale: float) -> Tensor:
    """Of scores before the scale, ``[videos, F, texts]``, in the place of grad."""
    grad -= (probabilities * grad).sum(1, keepdim=True)
    return grad.mul_(probabilities).mul_(scale)


def _bytes(text: Tensor, video_v: Tensor) -> int:
    """Of a video's pooled vectors and its scores."""
    return len(text) * (video_v.shape[2] * text.itemsize + video_v.shape[1] * 4) // 4


def forward(text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = text.new_empty(len(video_v), len(text), video_v.shape[2])
    if out.numel() > 0:
        for videos in videos_of(text, video_k, video_v, mask, _bytes(text, video_v)):
            shares = probabilities(videos.products(videos.k, text), videos.mask, scale).to(text.dtype)
            torch.bmm(shares.transpose(1, 2), videos.v, out=out[videos.places])
    return out


def backward(
    grad: Tensor, text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None, scale: float, wanted: list[bool]
) -> tuple[Tensor, ...]:
    """What of the three gradients is wanted; probabilities are computed again."""
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (video_k, video_v))
    sums = torch.zeros(text.shape, dtype=accumulate_dtype(text.dtype), device=text.device)
    if grad.numel() == 0:
        dk.zero_(), dv.zero_()
    else:
        for videos in videos_of(text, video_k, video_v, mask, _bytes(text, video_v)):
            shares, given = probabilities(videos.products(videos.k, text), videos.mask, scale), grad[videos.places]
            if wanted[2]:
                dv[videos.places] = videos.valid(torch.bmm(shares.to(text.dtype), given))
            if wanted[0] or wanted[1]:
                of_shares = torch.bmm(videos.v, given.transpose(1, 2)).to(shares.dtype)
                of_scores = as_rows(softmax_gradient(shares, of_shares, scale).to(text.dtype))
                if wanted[1]:
                    dk[videos.places] = videos.valid((of_scores @ text).view(dk[videos.places].shape))
                if wanted[0]:
                    add_product(sums, of_scores.t(), as_rows(videos.k))
    found = (empty_dense_like(text).copy_(sums), dk, dv)
    return tuple(x if want else grad.new_empty(0) for x, want in zip(found, wanted))
