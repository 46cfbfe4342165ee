"""Videos and what is said of them: reading a list, and one caption of a video in each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from i2v_kernels.video import read_sources

STREAM = 0xCA  # of random numbers: another than the loader's


class Captions(NamedTuple):
    """``videos``: paths, each once, as ``ClipLoader`` takes them; ``texts``: the captions of each, at least one."""

    videos: list[str]
    texts: list[list[str]]


def read_captions(data: Any) -> Captions:
    """The videos of a list with captions, in its order: a CSV whose header names ``path`` and ``caption``, as ``ClipLoader``
    reads it (other names, delimiters and encodings too), or a list of tuples (path, label, caption). Several rows of one
    path are several captions of one video.

    ``ValueError``: no caption at all, or a row without one, named; what `i2v_kernels.video.read_sources` refuses.
    """
    found: dict[str, list[str]] = {}
    rows = read_sources(data).videos
    if not any(row.caption for row in rows):
        raise ValueError(
            f"data={data!r} has no captions; retrieval needs a list whose first line names the columns path and caption, with "
            "a row for each caption of a video"
        )
    for number, row in enumerate(rows, 1):
        if not row.caption:
            raise ValueError(f"data={data!r} has no caption in row {number} of {len(rows)}: {row.path}")
        found.setdefault(row.path, []).append(row.caption)
    return Captions(list(found), list(found.values()))


def drawn(texts: Sequence[str], seed: int, epoch: int, item: int) -> str:
    """The caption of video ``item`` in ``epoch``: each of its ``texts`` comes once in as many epochs, in an order by chance."""
    cycle, turn = divmod(epoch, len(texts))
    order = np.random.default_rng([seed, cycle, 1 + item, 0, STREAM]).permutation(len(texts))
    return texts[order[turn]]


def digest(captions: Sequence[Sequence[str]]) -> str:
    """The same for the same captions of the same videos in the same order."""
    return hashlib.blake2b(repr([list(texts) for texts in captions]).encode(), digest_size=8).hexdigest()
