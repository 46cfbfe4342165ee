"""``frame_bias`` by PyTorch's matrix products, a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base import accumulate_dtype
from ..layout import empty_dense_like, empty_tokens
from ..products import block_count, gradient
from .cells import Cells, add_weight_gradients, cell_gradients, gather, outputs, scatter


def empty_output(q: Tensor, k: Tensor, weight_previous: Tensor, *_: Any) -> Tensor:
    """Memory for the output."""
    return empty_tokens(q[:, :, :, 0], weight_previous.shape[1])


def empty_gradients(q: Tensor, k: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Memory for those of q and k, zeros for the tokens of the prefix and, of one frame, for all."""
    dq, dk = empty_dense_like(q), torch.empty_like(k, memory_format=torch.contiguous_format)
    for x in (dq, dk):
        x[:, :, : prefix if q.shape[1] > 1 else None] = 0
    return dq, dk


@dataclass(frozen=True)
class Block:
    """Clips and, of each, frames that are computed together."""

    clips: slice
    frames: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.clips.stop - self.clips.start, self.frames.stop - self.frames.start

    def pairs(self, frames: int) -> Iterator[tuple[int, int, int]]:
        """``(frame, 0 for the previous or 1 for the next, that one)`` of clips of so many frames."""
        for t in range(self.frames.start, self.frames.stop):
            for side, other in enumerate((t - 1, t + 1)):
                if 0 <= other < frames:
                    yield t, side, other


def blocks_of(grid: Cells, q: Tensor) -> Iterator[Block]:
    """As many clips, and frames if it is one, as cells of one side or scores of a pair of frames make a block."""
    (batch, frames, _, heads, _), patches = q.shape, grid.height * grid.width
    most = block_count(q.device, patches * grid.count // 2 * q.itemsize)
    scores = heads * patches**2 * accumulate_dtype(q.dtype).itemsize
    clips = max(1, min(most // max(frames, 1), block_count(q.device, scores)))
    length = min(most, frames)
    for b in range(0, batch, clips):
        for t in range(0, frames, length):
            yield Block(slice(b, min(b + clips, batch)), slice(t, min(t + length, frames)))


class Attention:
    """Probabilities ``[clips * H, P, P]`` of pairs of frames, in memory that the next pair overwrites."""

    def __init__(self, q: Tensor, k: Tensor, prefix: int, scale: float) -> None:
        self.q, self.k, self.prefix, self.scale = q, k, prefix, scale
        self.scores = q.new_empty(0)
        self.dtype = accumulate_dtype(q.dtype)

    def queries(self, clips: slice, t: int) -> Tensor:
        """``[clips * H, P, D]`` times the scale."""
        found = self.q[clips, t, self.prefix :].transpose(1, 2)
        return torch.mul(found, self.scale, out=found.new_empty(found.shape)).flatten(0, 1)

    def keys(self, clips: slice, t: int) -> Tensor:
        """``[clips * H, P, D]``, from the last on."""
        return self.k[clips, t, self.prefix :].transpose(1, 2).flip(2).flatten(0, 1)

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        """Of such queries and keys."""
        shape = (*q.shape[:2], k.shape[1])
        if self.scores.shape != shape:
            self.scores = q.new_empty(shape)
        torch.bmm(q, k.transpose(1, 2), out=self.scores)
        if self.scores.dtype == self.dtype:
            return torch.softmax(self.scores, -1, out=self.scores)
        return torch.softmax(self.scores, -1, dtype=self.dtype)


def forward(
    q: Tensor, k: Tensor, weight_previous: Tensor, weight_next: Tensor, height: int, width: int, prefix: int, scale: float
) -> Tensor:
    out = empty_output(q, k, weight_previous)
    if q.shape[1] < 2:
        return out.zero_()
    out[:, :, :prefix] = 0
    if out.numel() == 0:
        return out
    grid = Cells(height, width)
    attention = Attention(q, k, prefix, scale)
    for block in blocks_of(grid, q):
        cells = q.new_zeros(grid.shape(prod(block.shape)))
        for t, side, other in block.pairs(q.shape[1]):
            probabilities = attention(attention.queries(block.clips, t), attention.keys(block.clips, other))
            scatter(grid, _mean(probabilities, q.shape[3]), cells, t - block.frames.start, side)
        outputs(grid, cells, weight_previous, weight_next, out[block.clips, block.frames], prefix)
    return out


def _mean(probabilities: Tensor, heads: int) -> Tensor:
    """``[clips, P, P]``."""
    return probabilities.unflatten(0, (-1, heads)).mean(1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, weight_previous: Tensor, weight_next: Tensor, height: int, width: int, prefix: int,
    scale: float, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What of the four gradients is wanted; probabilities are computed again, one pair of frames at a time."""
    want_qk, want_weights = wanted[0] or wanted[1], wanted[2] or wanted[3]
    dq, dk = empty_gradients(q, k, prefix)
    grid, attention, heads = Cells(height, width), Attention(q, k, prefix, scale), q.shape[3]
    shape: tuple[int, ...] = (grid.groups, 2 * height - 1, 2, grid.columns, weight_previous.shape[1])
    sums = torch.zeros(shape, dtype=attention.dtype, device=q.device) if want_weights else None
    d_previous: Any = None
    d_next: Any = None
    if grad.numel() == 0:
        dq.zero_(), dk.zero_()
    elif q.shape[1] > 1:
        for block in blocks_of(grid, q):
            clips, given = block.clips, grad[block.clips, block.frames]
            shape = grid.shape(prod(block.shape))
            cells, d_cells = (q.new_zeros(shape) if want else None for want in (want_weights, want_qk))
            if d_cells is not None:
                cell_gradients(grid, given, weight_previous, weight_next, prefix, d_cells)
            for t, side, other in block.pairs(q.shape[1]):
                of_q, of_k = attention.queries(clips, t), attention.keys(clips, other)
                probabilities = attention(of_q, of_k)
                if cells is not None:
                    scatter(grid, _mean(probabilities, heads), cells, t - block.frames.start, side)
                if d_cells is not None:
                    d_mean = gather(grid, d_cells, block.shape[0], t - block.frames.start, side).to(attention.dtype) / heads
                    d_scores = _softmax_gradient(probabilities, d_mean).to(q.dtype)
                    _add(dq[clips, t, prefix:], d_scores @ of_k, side == 0 or t == 0, scale)
                    # a key's frame meets the previous one, whose next it is, before the next one
                    _add(dk[clips, other, prefix:], (d_scores.transpose(1, 2) @ of_q).flip(1), side == 1 or other == 0)
            if cells is not None and sums is not None:
                add_weight_gradients(grid, given, cells, prefix, sums)
    if sums is not None:
        d_previous, d_next = grid.disarranged(sums)
    parameters = (q, k, weight_previous, weight_next)
    return tuple(gradient(g, p, w, grad) for g, p, w in zip((dq, dk, d_previous, d_next), parameters, wanted))


def _softmax_gradient(probabilities: Tensor, d_mean: Tensor) -> Tensor:
    """Of ``[clips * H, P, P]``, where heads have the same gradient, of ``[clips, P, P]``: ``p * (d - sum(p * d))``."""
    p = probabilities.unflatten(0, (len(d_mean), -1))
    work = p * d_mean[:, None]
    return work.addcmul_(p, work.sum(-1, keepdim=True), value=-1).flatten(0, 1)


def _add(into: Tensor, part: Tensor, first: bool, scale: float = 1.0) -> None:
    """``[clips * H, P, D]``, times the scale, to ``[clips, P, H, D]``."""
    part = part.unflatten(0, (len(into), -1)).transpose(1, 2)
    if first:
        torch.mul(part, scale, out=into)
    else:
        into.add_(part, alpha=scale)
