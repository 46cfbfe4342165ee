"""``text_conditioned_similarity`` by PyTorch's matrix products, a few videos and texts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..layout import empty_dense_like
from ..products import add_product, as_rows
from ..text_conditioned_pool.blocks import Videos, softmax_gradient, videos_of
from .reference import over_length

TEXTS = 4096  # at a time


@dataclass
class Pairs:
    """Some videos and some texts: probabilities and products with targets ``[videos, F, texts]``, lengths."""

    shares: Tensor
    products: Tensor
    gram: Tensor  # [videos, F, F]

    def __post_init__(self) -> None:
        self.along = torch.bmm(self.gram, self.shares)  # of the pooled video with each frame
        self.product = (self.shares * self.products).sum(1)
        self.over_pooled = over_length((self.shares * self.along).sum(1))

    def similarities(self) -> Tensor:
        """``[videos, texts]``."""
        return self.product * self.over_pooled


def gram_of(videos: Videos) -> Tensor:
    wide = videos.v.to(accumulate_dtype(videos.v.dtype))
    return torch.bmm(wide, wide.transpose(1, 2))


def pairs_of(videos: Videos, text: Tensor, unit: Tensor, scale: float) -> Iterator[tuple[slice, Pairs]]:
    gram = gram_of(videos)
    for first in range(0, len(text), TEXTS):
        places = slice(first, min(first + TEXTS, len(text)))
        products = videos.products(videos.v, unit[places]).to(gram.dtype)
        yield places, Pairs(videos.probabilities(text[places], scale), products, gram)


def _all_videos(text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None) -> Iterator[Videos]:
    return videos_of(text, video_k, video_v, mask, min(len(text), TEXTS) * video_k.shape[1] * 4)


def _over_length(target: Tensor) -> Tensor:
    """``[A, 1]``."""
    return over_length(target.to(accumulate_dtype(target.dtype)).square().sum(-1, keepdim=True))


def forward(text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    out = text.new_empty(len(text), len(video_k), dtype=accumulate_dtype(text.dtype))
    unit = (target * _over_length(target)).to(text.dtype)  # before the products, which could overflow in float16
    for videos in _all_videos(text, video_k, video_v, mask):
        for places, pairs in pairs_of(videos, text, unit, scale):
            out[places, videos.places] = pairs.similarities().t()
    return out


def backward(
    grad: Tensor, text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the four gradients is wanted; probabilities and products are computed again."""
    kind = accumulate_dtype(text.dtype)
    dtext, dtarget = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (text, target))
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (video_k, video_v))
    along = torch.zeros(len(text), 1, dtype=kind, device=text.device)
    over_target = _over_length(target)
    unit = (target * over_target).to(text.dtype)
    for videos in _all_videos(text, video_k, video_v, mask):
        of_k, of_v = (torch.zeros(as_rows(x).shape, dtype=kind, device=x.device) for x in (videos.k, videos.v))
        squares = torch.zeros(len(videos), *[video_k.shape[1]] * 2, dtype=kind, device=text.device)
        for places, pairs in pairs_of(videos, text, unit, scale):
            of_product = grad[places, videos.places].t() * pairs.over_pooled  # [videos, texts]
            of_square = of_product * pairs.product * pairs.over_pooled.square()  # half of it, with the sign turned
            if wanted[0] or wanted[1]:
                of_shares = pairs.products.mul_(of_product[:, None]) - pairs.along.mul_(of_square[:, None])
                of_scores = as_rows(softmax_gradient(pairs.shares, of_shares, scale).to(text.dtype))
                if wanted[0]:
                    add_product(dtext[places], of_scores.t(), as_rows(videos.k))
                if wanted[1]:
                    add_product(of_k, of_scores, text[places])
            if wanted[2]:
                squares -= torch.bmm(pairs.shares * of_square[:, None], pairs.shares.transpose(1, 2))
            if wanted[2] or wanted[3]:
                shares = as_rows(pairs.shares.mul_(of_product[:, None]).to(text.dtype))
                if wanted[2]:
                    add_product(of_v, shares, unit[places])
                if wanted[3]:
                    add_product(dtarget[places], shares.t(), as_rows(videos.v))
                    along[places] += (of_product * pairs.product).sum(0)[:, None]
        if wanted[1]:
            dk[videos.places] = videos.valid(of_k.view(videos.k.shape))
        if wanted[2]:
            of_v = of_v.view(videos.v.shape).baddbmm_(squares, videos.v.to(kind))
            dv[videos.places] = videos.valid(of_v)
    dtarget = (dtarget - along * unit).mul_(over_target)
    found = (empty_dense_like(text).copy_(dtext), dk, dv, dtarget.to(text.dtype))
    return tuple(x if want else grad.new_empty(0) for x, want in zip(found, wanted))
