"""X-Pool's layer with all that is linear in a video's frames folded into them: a pair of text and video meets numbers alone.

With p the probabilities of a pair, over F frames, the layer is ``o = sum_f p[f] v[f]`` (``out_proj`` of values is one of their
mean, as probabilities sum to 1), ``y = norm2(o)``, ``z = y + linear(y)``, ``norm3(z)``. The mean over channels of o is that of
means of v, its variance a quadratic form of p; so ``y = sum_f w[f] (scale * c[f]) + shift`` with c the values less their means
and ``w = p / deviation``. Then z is a sum over frames with the same weights, and so is what norm3 divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.text_conditioned_similarity.reference import over_length


def probabilities(text: Tensor, video_k: Tensor, mask: Tensor | None) -> Tensor:
    """``[V, F, A]`` of ``text [A, D]`` over the valid frames of ``[V, F, D]``, zeros where none is; float32 at least."""
    scores = (video_k.flatten(0, 1) @ text.t()).unflatten(0, video_k.shape[:2]) * text.shape[1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores.softmax(1)
    valid = mask[:, :, None]
    return scores.masked_fill(~valid & mask.any(1)[:, None, None], float("-inf")).softmax(1).masked_fill(~valid, 0)


def quadratic(gram: Tensor, weights: Tensor) -> Tensor:
    """``sum_fg w[f] w[g] gram[f, g]`` of ``[V, F, F]`` and ``[V, F, A]``: ``[V, A]``."""
    return (weights * (gram @ weights)).sum(1)


def weighted(shares: Tensor, gram: Tensor, eps: float) -> Tensor:
    """Probabilities over the deviation of what they are of."""
    return shares * (quadratic(gram, shares).clamp_min(0) + eps).rsqrt()[:, None]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x @ (x if y is None else y).transpose(-2, -1)


@dataclass
class Frames:
    """A layer's frames, float32 at least: values less their means, and what norm2 and the linear layer make of them."""

    layer: Any
    gram: Tensor  # [V, F, F], over the number of channels
    normed: Tensor  # [V, F, C]: of y, without the shift
    shift: Tensor  # [C]
    linear: Tensor  # [V, F, C]: of linear(y), without its shift
    linear_shift: Tensor

    @classmethod
    def of(cls, layer: Any, values: Tensor) -> Frames:
        """``values [V, F, C]`` after ``out_proj``; ``layer_norm2`` and ``linear_proj`` are read, neither is called."""
        kind = torch.promote_types(values.dtype, torch.float32)
        scale, shift, weight = (
            x.to(kind) for x in (layer.layer_norm2.weight, layer.layer_norm2.bias, layer.linear_proj.weight)
        )
        bias = None if layer.linear_proj.bias is None else layer.linear_proj.bias.to(kind)
        centred = _centred(values.to(kind))
        normed = centred * scale
        gram = _gram(centred) / values.shape[2]
        return cls(layer, gram, normed, shift, F.linear(normed, weight), F.linear(shift, weight, bias))

    def weights(self, shares: Tensor) -> Tensor:
        return weighted(shares, self.gram, self.layer.layer_norm2.eps)


def drops(dropout: Any) -> bool:
    """Whether it is at work."""
    return dropout.training and dropout.p > 0


def folded(layer: Any, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Frames]:
    """Queries, keys, and frames with the layers after the attention folded into them."""
    attn, video = layer.cross_attn, layer.layer_norm1(video)
    q, k = attn.q_proj(layer.layer_norm1(text)), attn.k_proj(video)
    values = attn.out_proj(attn.v_proj(video))
    with torch.autocast(text.device.type, enabled=False):
        return q, k, Frames.of(layer, values)


def by_frames(layer: Any, text: Tensor, video: Tensor, mask: Tensor | None = None) -> Tensor:
    """The layer's output ``[V, A, C]``, of one head."""
    q, k, frames = folded(layer, text, video)
    with torch.autocast(text.device.type, enabled=False):
        x = pooled(layer, frames.weights(probabilities(q, k, mask)), frames, k.dtype)
    return layer.layer_norm3(x)


def pooled(layer: Any, weights: Tensor, frames: Frames, dtype: torch.dtype) -> Tensor:
    """``[V, A, C]`` before norm3, from ``weights [V, F, A]``. What is dropped is dropped by the layer's own dropout."""
    by = weights.to(dtype).transpose(1, 2)

    def summed(x: Tensor, shift: Tensor) -> Tensor:
        return torch.baddbmm(shift.to(dtype), by, x.to(dtype))

    if drops(layer.dropout):
        return summed(frames.normed, frames.shift) + layer.dropout(summed(frames.linear, frames.linear_shift))
    return summed(frames.normed + frames.linear, frames.shift + frames.linear_shift)


@dataclass
class Cosines:
    """Of targets and the layer's output, from weights alone: ``out = r (sum_f w[f] x[f] + constant) + last``, r over norm3's
    deviation, x and constant less their means and times norm3's scale, last its shift.
    """

    eps: float
    variance: tuple[Tensor, Tensor, Tensor]  # quadratic, linear and constant terms of norm3's, in w
    square: tuple[Tensor, Tensor, Tensor]  # those of |out|^2, where r^2 stands before them
    cross: tuple[Tensor, Tensor]  # linear and constant, where 2 r does
    rows: Tensor  # [V, F, C]: x
    constant: Tensor
    last: Tensor

    @classmethod
    def of(cls, layer: Any, frames: Frames) -> Cosines:
        norm, kind = layer.layer_norm3, frames.normed.dtype
        scale, last = norm.weight.to(kind), norm.bias.to(kind)
        rows, constant = _centred(frames.normed + frames.linear), _centred(frames.shift + frames.linear_shift)
        variance = tuple(x / len(constant) for x in (_gram(rows), rows @ constant, constant @ constant))
        rows, constant = rows * scale, constant * scale
        square = _gram(rows), rows @ constant, constant @ constant
        return cls(norm.eps, variance, square, (rows @ last, constant @ last), rows, constant, last)  # type: ignore[arg-type]

    @staticmethod
    def _form(terms: tuple[Tensor, Tensor, Tensor], weights: Tensor) -> Tensor:
        gram, along, constant = terms
        return (weights * (gram @ weights + 2 * along[:, :, None])).sum(1) + constant

    def __call__(self, target: Tensor, weights: Tensor) -> Tensor:
        """``[A, V]`` of ``target [A, C]`` of unit length and ``weights [V, F, A]``."""
        products = (self.rows.flatten(0, 1) @ target.t()).unflatten(0, self.rows.shape[:2])
        r = (self._form(self.variance, weights).clamp_min(0) + self.eps).rsqrt()  # [V, A]
        along = ((weights * products).sum(1) + target @ self.constant) * r + target @ self.last
        cross = (weights * self.cross[0][:, :, None]).sum(1) + self.cross[1]
        square = self._form(self.square, weights) * r.square() + 2 * cross * r + self.last @ self.last
        return (along * over_length(square)).t()
