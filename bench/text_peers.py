"""What a user would write without this package of texts and videos: see peers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def late_published(
    text: Tensor, video: Tensor, *, text_weight: Tensor | None = None, video_weight: Tensor | None = None, mode: str = "wti",
    temperature: float = 0.0, normalize: bool = False,
) -> Tensor:  # fmt: skip
    """As published by DRL, ColBERT and X-CLIP: the similarities of all tokens of all pairs by einsum, then what is sought."""
    if normalize:
        text, video = F.normalize(text, dim=2), F.normalize(video, dim=2)
    s = torch.einsum("atd,bvd->abtv", text, video)

    def sought(dim: int) -> Tensor:
        return ((s / temperature).softmax(dim) * s).sum(dim) if temperature else s.max(dim).values

    if mode == "maxsim":
        return sought(3).float().sum(2)
    of_text, of_video = sought(3).float(), sought(2).float()
    if text_weight is None or video_weight is None:
        return (of_text.mean(2) + of_video.mean(2)) / 2
    return (
        torch.einsum("abt,at->ab", of_text, text_weight.float()) + torch.einsum("abv,bv->ab", of_video, video_weight.float())
    ) / 2


def late_by_products(text: Tensor, video: Tensor, **options: Any) -> Tensor:
    """The same of similarities as the product leaves them, ``[A * Nt, V * Nv]``, where maxima are asked of views."""
    if options.pop("normalize", False):
        text, video = F.normalize(text, dim=2), F.normalize(video, dim=2)
    temperature = options.get("temperature", 0.0)
    s = (text.flatten(0, 1) @ video.flatten(0, 1).t()).view(*text.shape[:2], *video.shape[:2])  # [A, Nt, V, Nv]

    def sought(dim: int) -> Tensor:
        return ((s / temperature).softmax(dim) * s).sum(dim) if temperature else s.amax(dim)

    of_text = sought(3).float()
    if options.get("mode") == "maxsim":
        return of_text.sum(1)
    of_video = sought(1).float()
    if "text_weight" not in options:
        return (of_text.mean(1) + of_video.mean(2)) / 2
    weighted = torch.einsum("atb,at->ab", of_text, options["text_weight"].float())
    return (weighted + torch.einsum("abv,bv->ab", of_video, options["video_weight"].float())) / 2


def mean_published(x: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """As CLIP4Clip writes it: norms, a mask times the frames, their sum over the mask's, the norm again."""
    if normalize:
        x = x / x.norm(dim=-1, keepdim=True)
    if mask is None:
        mean = x.mean(1)
    else:
        valid = mask.to(x.dtype)[:, :, None]
        mean = (x * valid).sum(1) / valid.sum(1).clamp_min(1)
    return mean / mean.norm(dim=-1, keepdim=True) if normalize else mean


def mean_product(x: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """The frames' weights, a product with the frames for each clip, ``F.normalize``."""
    weights = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
    if normalize:
        weights = weights / x.norm(dim=-1).clamp_min(1e-12)
    mean = (weights[:, None] @ x)[:, 0]
    return F.normalize(mean, dim=-1) if normalize else mean


def pool_published(text: Tensor, video_k: Tensor, video_v: Tensor) -> Tensor:
    """As published by X-Pool: scores ``[V, F, A]``, values ``[V, E, F]`` times these, turned round."""
    shares = ((video_k @ text.t()) / text.shape[1] ** 0.5).softmax(1)
    return (video_v.transpose(1, 2) @ shares).transpose(1, 2).contiguous()


def pool_einsum(text: Tensor, video_k: Tensor, video_v: Tensor) -> Tensor:
    """Two products and a softmax; PyTorch arranges the batches."""
    scores = torch.einsum("ad,vfd->vaf", text, video_k) * text.shape[1] ** -0.5
    return torch.einsum("vaf,vfe->vae", scores.softmax(-1), video_v)


def pool_sdpa(text: Tensor, video_k: Tensor, video_v: Tensor) -> Tensor:
    """``scaled_dot_product_attention``, the texts expanded to the videos."""
    queries = text.expand(len(video_k), 1, *text.shape)
    return F.scaled_dot_product_attention(queries, video_k[:, None], video_v[:, None])[:, 0]


def compared(pool: Callable[..., Tensor], text: Tensor, video_k: Tensor, video_v: Tensor, target: Tensor) -> Tensor:
    """The similarity as published by X-Pool: pooled videos and targets over their lengths, a product for each text."""
    pooled = pool(text, video_k, video_v)
    pooled = pooled / pooled.norm(dim=-1, keepdim=True)
    target = target / target.norm(dim=-1, keepdim=True)
    return torch.bmm(target[:, None], pooled.permute(1, 2, 0))[:, 0].float()
