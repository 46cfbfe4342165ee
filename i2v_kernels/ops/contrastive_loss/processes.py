"""A batch that several processes share: who holds which pairs, videos gathered from all, sums over all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import accumulate_dtype


@dataclass(frozen=True)
class Pairs:
    """The pairs of the whole batch, of which this process holds ``count`` from ``first`` on."""

    counts: tuple[int, ...]
    rank: int = 0
    group: Any = None

    @classmethod
    def of(
        cls, op: str, group: Any, texts: Sequence[Tensor | None], videos: Sequence[Tensor | None], numbers: Sequence[Tensor]
    ) -> Pairs:
        """Asks all processes of the group what they hold, and whether it fits together."""
        here = dist.is_available() and dist.is_initialized()
        if group is not None and not here:
            raise ValueError(f"{op}: group={group!r}, but torch.distributed is not initialized")
        count = next(len(x) for x in texts if x is not None)
        if not here or dist.get_world_size(group) == 1:
            return cls((count,))
        if dist.get_rank(group) < 0:
            raise ValueError(f"{op}: group={group!r}, but this process is not in it")
        grad = torch.is_grad_enabled()
        kinds = [None if x is None else (tuple(x.shape[1:]), str(x.dtype), grad and x.requires_grad) for x in videos]
        mine = (kinds, [grad and x.requires_grad for x in numbers])
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (count, mine), group)
        for rank, (_, theirs) in enumerate(found):
            if theirs != found[0][1]:
                raise ValueError(
                    f"{op}: processes 0 and {rank} differ in the videos' (shape, dtype, requires_grad), or in whether scale "
                    f"and bias require gradients: {found[0][1]} and {theirs}"
                )
        pairs = cls(tuple(n for n, _ in found), dist.get_rank(group), group)
        if 0 in pairs.counts:
            raise ValueError(f"{op}: process {pairs.counts.index(0)} has no pair, but each needs at least one")
        return pairs

    @property
    def world(self) -> int:
        return len(self.counts)

    @property
    def whole(self) -> int:
        return sum(self.counts)

    @property
    def first(self) -> int:
        return sum(self.counts[: self.rank])

    @property
    def count(self) -> int:
        return self.counts[self.rank]

    def sum(self, x: Tensor) -> Tensor:
        """Over processes."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """Over processes, of each one's own."""
        if self.world == 1:
            return x
        most = x.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        most.masked_fill_(~most.isfinite(), 0)
        return self.sum((x - most).exp()).log() + most


def gathered(x: Tensor, pairs: Pairs) -> Tensor:
    """``[B, ...]`` of all processes; gradients go back, summed, to where rows came from."""
    return x if pairs.world == 1 else _Gather.apply(x, pairs)


def shared(x: Tensor, pairs: Pairs) -> Tensor:
    """A number that all processes have; its gradient is their mean."""
    return x if pairs.world == 1 else _Share.apply(x, pairs)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        padded = x.new_zeros(max(pairs.counts), *x.shape[1:])
        padded[: pairs.count] = x
        found = x.new_empty(pairs.world, *padded.shape)
        kind = torch.uint8 if x.dtype == torch.bool else x.dtype  # gloo knows no bool
        dist.all_gather_into_tensor(found.view(kind).flatten(0, 1), padded.view(kind), group=pairs.group)
        return torch.cat([rows[:count] for rows, count in zip(found, pairs.counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        pairs = ctx.pairs
        padded = grad.new_zeros(pairs.world, max(pairs.counts), *grad.shape[1:], dtype=accumulate_dtype(grad.dtype))
        for into, rows in zip(padded, grad.split(pairs.counts)):
            into[: len(rows)] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=pairs.group)
        return own[: pairs.count].to(grad.dtype), None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.pairs.sum(grad.clone()) / ctx.pairs.world, None
