"""``text_conditioned_similarity`` by PyTorch's matrix products, a few videos and texts at a time.

Between the products stands what is done for each pair of a text and a video with a number for each frame: here by PyTorch's
operators, in ``triton_kernels.py`` by kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..layout import empty_dense_like
from ..products import add_product, as_rows
from ..text_conditioned_pool.blocks import Videos, probabilities, softmax_gradient, videos_of
from .reference import over_length

TEXTS = 4096  # at a time


class Gradients(NamedTuple):
    """Of some videos and texts; None for what is not wanted."""

    scores: Tensor | None  # [videos * F, texts], before the scale
    products: Tensor | None  # [videos * F, texts]
    gram: Tensor | None  # [videos, F, F]: its symmetric part, twice
    along: Tensor | None  # [texts]: of the targets' lengths, summed over videos


class Pairs:
    """Of ``scores [videos, F, texts]`` before the scale, ``products [videos, F, texts]`` of targets and frames, which may be
    overwritten, and ``gram [videos, F, F]``.
    """

    @staticmethod
    def forward(scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
        """Cosines, into ``out [texts, videos]``."""
        shares = probabilities(scores, mask, scale)
        square = (shares * torch.bmm(gram, shares)).sum(1)
        out.copy_(((shares * products).sum(1) * over_length(square)).t())

    @staticmethod
    def backward(
        grad: Tensor, scores: Tensor, products: Tensor, gram: Tensor, mask: Tensor | None, scale: float, wanted: list[bool]
    ) -> Gradients:
        """``grad [texts, videos]``."""
        kind, shares, products = scores.dtype, probabilities(scores, mask, scale), products.to(gram.dtype)
        along = torch.bmm(gram, shares)  # of the pooled video with each frame
        product = (shares * products).sum(1)
        over = over_length((shares * along).sum(1))
        of_product = grad.t() * over
        of_square = of_product * product * over.square()  # twice, with the sign turned
        of_scores = of_gram = of_products = of_target = None
        if wanted[0] or wanted[1]:
            of_shares = products.mul_(of_product[:, None]) - along.mul_(of_square[:, None])
            of_scores = as_rows(softmax_gradient(shares, of_shares, scale).to(kind))
        if wanted[2]:
            of_gram = torch.bmm(shares * of_square[:, None], shares.transpose(1, 2)).neg_()
        if wanted[2] or wanted[3]:
            of_products = as_rows(shares.mul_(of_product[:, None]).to(kind))
        if wanted[3]:
            of_target = (of_product * product).sum(0)
        return Gradients(of_scores, of_products, of_gram, of_target)


def gram_of(videos: Videos) -> Tensor:
    wide = videos.v.to(accumulate_dtype(videos.v.dtype))
    return torch.bmm(wide, wide.transpose(1, 2))


def blocks_of(text: Tensor, video_k: Tensor, video_v: Tensor, mask: Tensor | None) -> Iterator[Videos]:
    return videos_of(text, video_k, video_v, mask, min(len(text), TEXTS) * video_k.shape[1] * 4)


def texts_of(text: Tensor) -> Iterator[slice]:
    for first in range(0, len(text), TEXTS):
        yield slice(first, min(first + TEXTS, len(text)))


def over_target(target: Tensor) -> Tensor:
    """``[A, 1]``."""
    return over_length(target.to(accumulate_dtype(target.dtype)).square().sum(-1, keepdim=True))


def as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast, which would cast the numbers in float32 that its products take."""

    @wraps(function)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.autocast("cuda" if first.is_cuda else "cpu", enabled=False):
            return function(first, *rest, **options)

    return run


@as_given
def forward(
    text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float, pairs: Any = Pairs
) -> Tensor:
    out = text.new_empty(len(text), len(video_k), dtype=accumulate_dtype(text.dtype))
    unit = (target * over_target(target)).to(text.dtype)  # before the products, which could overflow in float16
    for videos in blocks_of(text, video_k, video_v, mask):
        gram = gram_of(videos)
        for places in texts_of(text):
            found = (videos.products(x, rows[places]) for x, rows in ((videos.k, text), (videos.v, unit)))
            pairs.forward(*found, gram, videos.mask, scale, out[places, videos.places])
    return out


@as_given
def backward(
    grad: Tensor, text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor, mask: Tensor | None, scale: float,
    wanted: list[bool], pairs: Any = Pairs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the four gradients is wanted; probabilities and products are computed again."""
    kind = accumulate_dtype(text.dtype)
    dtext, dtarget = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (text, target))
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (video_k, video_v))
    along = torch.zeros(len(text), dtype=kind, device=text.device)
    over = over_target(target)
    unit = (target * over).to(text.dtype)
    for videos in blocks_of(text, video_k, video_v, mask):
        gram = gram_of(videos)
        of_k, of_v = (torch.zeros(as_rows(x).shape, dtype=kind, device=x.device) for x in (videos.k, videos.v))
        of_gram = torch.zeros_like(gram)
        for places in texts_of(text):
            found = (videos.products(x, rows[places]) for x, rows in ((videos.k, text), (videos.v, unit)))
            of: Any = pairs.backward(grad[places, videos.places], *found, gram, videos.mask, scale, wanted)
            if wanted[0]:
                add_product(dtext[places], of.scores.t(), as_rows(videos.k))
            if wanted[1]:
                add_product(of_k, of.scores, text[places])
            if wanted[2]:
                of_gram += of.gram
                add_product(of_v, of.products, unit[places])
            if wanted[3]:
                add_product(dtarget[places], of.products.t(), as_rows(videos.v))
                along[places] += of.along
        if wanted[1]:
            dk[videos.places] = videos.valid(of_k.view(videos.k.shape))
        if wanted[2]:
            dv[videos.places] = videos.valid(of_v.view(videos.v.shape).baddbmm_(of_gram, videos.v.to(kind)))
    dtarget = (dtarget - along[:, None] * unit).mul_(over)
    grads = (empty_dense_like(text).copy_(dtext), dk, dv, dtarget.to(text.dtype))
    return tuple(x if want else grad.new_empty(0) for x, want in zip(grads, wanted))
