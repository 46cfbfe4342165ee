"""Which clips make up which batch: the order of an epoch and the shares of the ranks, without reading a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One clip of a plan: video number, view number, and False if it only fills up a rank's share."""

    item: int
    view: int
    valid: bool


class Request(NamedTuple):
    """The plan of batch ``number`` of an epoch."""

    number: int
    epoch: int
    entries: list[Entry]


@dataclass(frozen=True)
class Plan:
    """The batches of rank ``rank`` of ``world_size``; ``len(plan)`` of them per epoch, on every rank.

    A step takes the next ``batch_size * world_size`` clips of the epoch's order and gives each rank an equal part.
    ``views`` is the number of clips made of each of the ``videos`` videos; they stay together.
    """

    videos: int
    views: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    rank: int
    world_size: int

    def __len__(self) -> int:
        full, rest = divmod(self.videos * self.views, self.batch_size * self.world_size)
        return full + (rest > 0 and not self.drop_last)

    def requests(self, epoch: int, start: int = 0) -> Iterator[Request]:
        """Batches ``start``, ``start + 1``, ... of an epoch."""
        return (self.request(epoch, number) for number in range(start, len(self)))

    def request(self, epoch: int, number: int) -> Request:
        """Batch ``number`` of an epoch."""
        total = self.videos * self.views
        order = _order(self.videos, self.shuffle, self.seed, epoch)
        first = number * self.batch_size * self.world_size
        share = min(self.batch_size, -(-(total - first) // self.world_size))
        places = range(first + self.rank * share, first + (self.rank + 1) * share)
        entries = [Entry(int(order[p % total // self.views]), p % self.views, p < total) for p in places]
        return Request(number, epoch, entries)


@lru_cache(maxsize=4)
def _order(videos: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(videos) if shuffle else np.arange(videos)
