"""The clips of a store that are nearest to queries: all of them are compared, as fast as they can be read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from i2v_models.progress import Progress
from i2v_models.retrieval.reader import Reader, bytes_of
from i2v_models.retrieval.store import FeatureStore

TILE = 1 << 20  # numbers of a store that are compared at once: 4 MB in float32, which caches hold
SCORES = 1 << 20  # that wait for the best of them to be found, if they are of several tiles
TILES = 16  # of them between two steps of progress
ROWS, MOST_ROWS = 16, 4096  # a tile's clips are a multiple of the one, up to the other
Similarity = Callable[..., Tensor]
_alone = threading.Lock()  # PyTorch's number of threads is one for all


class TopK(NamedTuple):
    """`[Q, k]` each, the best first."""

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def top_k(
    queries: Tensor, store: FeatureStore, k: int, similarity: Similarity | None = None, *, progress: bool = False
) -> TopK:
    """The `k` clips of `store` with the highest scores for each query, and these scores; exact, no index that leaves some out.

    Args:
        queries: `[Q, D]`, or what `similarity` takes, with a leading dimension Q.
        store: read once, from one end to the other, whatever the number of queries.
        k: all clips if it has fewer.
        similarity: None takes dot products, in float32 (float64 if the queries are), of one vector a clip; in a store that was
            made with `normalize` the queries are brought to unit length too, so they are cosines. Or a function of
            queries and features `[n, D]` or `[n, N, D]` that returns `[Q, n]`, such as
            `functools.partial(i2v_kernels.late_interaction, mode="wti", text_mask=mask)`. It gets features in the
            queries' dtype on their device, and the store's mask and weights as `video_mask` and `video_weight`; a score
            must depend on its own query and clip alone. Several threads call it.
        progress: whether to show how far it is.

    Equal scores go to the clip with the lower number. Clips are compared in tiles of a size that depends on the dimensions
    alone, each by one thread (there are `torch.get_num_threads()` of them), so scores are the same bits for any size of the
    store's blocks and any number of threads. Resident memory is that of a few tiles, however large the store is.

    `ValueError` names a query that is not finite, a clip whose score is NaN, and what does not fit.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a whole number, at least 1, got {k!r}")
    queries = _checked(queries, store, similarity)
    rows = _rows(store)
    chunk = rows * TILES
    chunks = iter(range(0, len(store), chunk))
    together = max(1, min(TILES, SCORES // max(1, rows * len(queries))))
    lock, stop = threading.Lock(), threading.Event()

    def work(_: int) -> _Best:
        best = _Best(queries, k)
        try:
            with Reader(store) as reader, torch.no_grad():  # each thread has its own
                tile = _Tile(reader, rows, queries, similarity is None)
                while not stop.is_set():
                    with lock:
                        first = next(chunks, None)
                    if first is None:
                        break
                    waiting: list[Tensor] = []
                    for count in tile.over(first, min(len(store), first + chunk)):
                        waiting.append(_scores(queries, tile, similarity)[:, :count])
                        if len(waiting) == together:
                            first += best.add(torch.cat(waiting, 1), first)
                            waiting.clear()
                    if waiting:
                        best.add(torch.cat(waiting, 1), first)
                    with lock:
                        bar.update()
        except BaseException:
            stop.set()
            raise
        return best

    count = -(-len(store) // chunk)
    workers = min(torch.get_num_threads(), count)
    with _alone, Progress(count, "part", show=progress) as bar:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(max(1, workers)) as pool:
                try:
                    found = list(pool.map(work, range(workers)))
                finally:
                    stop.set()
        finally:
            torch.set_num_threads(threads)
    best = _Best(queries, k)
    for part in sorted(found, key=lambda part: part.scores.shape[1], reverse=True):
        best.join(part)
    return TopK(best.scores, best.indices)


class _Tile:
    """``rows`` clips of a store, in memory that is used again and again; after the store's last clip there are zeros."""

    def __init__(self, reader: Reader, rows: int, queries: Tensor, exact: bool) -> None:
        self.reader, self.rows, self.device = reader, rows, queries.device
        store, self.dtype = reader.store, torch.promote_types(queries.dtype, torch.float32) if exact else queries.dtype
        shape = [rows, store.dim] if store.tokens is None else [rows, store.tokens, store.dim]
        self.stored = {"features": torch.zeros(shape, dtype=store.dtype)}
        self.stored |= {"mask": torch.zeros(shape[:2], dtype=torch.bool)} if store.has_mask else {}
        self.stored |= {"weights": torch.zeros(shape[:2])} if store.has_weights else {}
        self.memory = {name: bytes_of(value) for name, value in self.stored.items()}
        self.exact = torch.zeros(shape, dtype=self.dtype) if self.device.type == "cpu" and store.dtype != self.dtype else None

    def over(self, first: int, last: int) -> Iterator[int]:
        """Holds clips ``first`` to ``last``, one tile after the other, and yields how many each holds."""
        for begin in range(first, last, self.rows):
            count = min(self.rows, last - begin)
            self.reader.into(begin, count, self.memory)
            for value in self.stored.values() if count < self.rows else ():
                value[count:] = 0
            yield count

    def features(self) -> Tensor:
        if self.exact is not None:
            return self.exact.copy_(self.stored["features"])
        return self.stored["features"].to(self.device).to(self.dtype)  # to other devices go the fewest bytes

    def keywords(self) -> dict[str, Tensor]:
        names = {"mask": "video_mask", "weights": "video_weight"}
        return {names[name]: value.to(self.device) for name, value in self.stored.items() if name in names}


class _Best:
    """The best scores `[Q, m]` and their clips, m up to k, of the clips that were added; equal scores by the clip's number."""

    def __init__(self, queries: Tensor, k: int) -> None:
        self.k = k
        self.scores = torch.empty(len(queries), 0, device=queries.device)
        self.indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def add(self, scores: Tensor, first: int) -> int:
        """Adds ``scores`` `[Q, n]` of clips from ``first`` on, which come after all those that were added; n."""
        count = scores.shape[1]
        top = scores.amax(1)
        full = self.scores.shape[1] == self.k
        rows = (~(top <= self.scores[:, -1])).nonzero()[:, 0] if full else torch.arange(len(top), device=top.device)
        if full and len(rows) == 0:
            return count
        if bool(top[rows].isnan().any()):
            query, clip = (int(place) for place in scores.isnan().nonzero()[0])
            raise ValueError(f"the score of query {query} and clip {first + clip} is NaN")
        scores = scores[rows]
        # No fewer than the k best of these, and of equal ones all, since topk takes any of them.
        wanted = scores >= scores.topk(min(self.k, scores.shape[1])).values[:, -1:]
        if full:
            wanted &= scores > self.scores[rows, -1:]
        row, column = wanted.nonzero(as_tuple=True)
        self._merge(count, rows, row, scores[row, column], first + column)
        return count

    def join(self, other: _Best) -> None:
        """The best of other clips, in any order."""
        rows, count = torch.arange(len(self.scores), device=self.scores.device), other.scores.shape[1]
        self._merge(count, rows, rows.repeat_interleave(count), other.scores.flatten(), other.indices.flatten())

    def _merge(self, added: int, rows: Tensor, row: Tensor, scores: Tensor, indices: Tensor) -> None:
        """Takes in the candidates among ``added`` clips for ``rows``; ``row`` has the place in ``rows`` of each of them."""
        before = self.scores.shape[1]
        row = torch.cat([torch.arange(len(rows), device=row.device).repeat_interleave(before), row])
        scores = torch.cat([self.scores[rows].flatten().to(scores.dtype), scores])
        indices = torch.cat([self.indices[rows].flatten(), indices])
        order = indices.argsort()
        order = order[scores[order].argsort(descending=True, stable=True)]
        order = order[row[order].argsort(stable=True)]
        count = row.bincount(minlength=len(rows))
        place = torch.arange(len(order), device=row.device) - (count.cumsum(0) - count).repeat_interleave(count)
        order = order[place < self.k]
        size = min(self.k, before + added)
        if size > before:  # then rows are all
            shape = len(self.scores), size
            self.scores, self.indices = scores.new_empty(shape), indices.new_empty(shape)
        self.scores[rows] = scores[order].view(len(rows), size)
        self.indices[rows] = indices[order].view(len(rows), size)


def _scores(queries: Tensor, tile: _Tile, similarity: Similarity | None) -> Tensor:
    """`[Q, rows]` of the clips that ``tile`` holds."""
    features = tile.features()
    if similarity is None:
        return queries.to(features.dtype) @ features.T
    scores = similarity(queries, features, **tile.keywords())
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or list(scores.shape) != [len(queries), tile.rows]:
        got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else repr(type(scores))
        raise ValueError(f"similarity must return floating point [{len(queries)}, {tile.rows}], got {got}")
    return scores


def _rows(store: FeatureStore) -> int:
    """Clips of a tile, by the dimensions alone."""
    rows = min(MOST_ROWS, TILE // (store.dim * (store.tokens or 1)))
    return max(ROWS, rows // ROWS * ROWS)


def _checked(queries: Tensor, store: FeatureStore, similarity: Similarity | None) -> Tensor:
    if not isinstance(queries, Tensor) or not queries.is_floating_point():
        raise TypeError(f"queries must be a floating point tensor, got {getattr(queries, 'dtype', type(queries))}")
    if similarity is None and store.tokens is not None:
        raise ValueError(f"similarity=None compares one vector a clip; {store.folder} holds {store.tokens} tokens a clip")
    if similarity is None and (queries.ndim != 2 or queries.shape[1] != store.dim):
        raise ValueError(f"queries must be [Q, {store.dim}] as the store's features, got {list(queries.shape)}")
    if queries.ndim == 0:
        raise ValueError("queries must have a leading dimension Q, got a single number")
    finite = queries.isfinite().flatten(1).all(1) if queries.ndim > 1 else queries.isfinite()
    if not bool(finite.all()):
        raise ValueError(f"query {int((~finite).nonzero()[0])} is not finite")
    if similarity is None:
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        return F.normalize(queries, dim=-1) if store.normalize else queries
    return queries
