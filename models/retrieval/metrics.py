"""Recall and ranks of text-to-video and video-to-text retrieval.

Ranks are counted, not sorted: two walks over blocks of rows of the similarity, of which the first takes the scores of the right
pairs and the second counts the candidates that reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
ENTRIES = 1 << 22  # of the similarity that are compared at once


def retrieval_metrics(
    similarity: Any | Callable[[], Iterable[Any]],
    text_video: Sequence[int | Sequence[int]] | Any | None = None,
    *,
    group_captions: bool = False,
) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 in percent, median and mean rank (from 1), in both directions.

    Args:
        similarity: `[A, V]` scores of A texts and V videos, higher is nearer: a NumPy array (a memory map too), a tensor, or
            nested lists. Or a function without arguments that returns an iterator over blocks of its rows in order,
            `[a, V]` each, so that the whole need never exist; it is called twice and has to give the same both times.
        text_video: for each text the number of its right video, or a sequence of several. None: text i belongs to video i. A
            text with none (an empty sequence) is a candidate without being a query, and so is a video that no text names.
        group_captions: whether, from video to text, all captions of another video count as one candidate by the best of
            them, as CLIP4Clip, X-Pool and DRL report MSVD. Otherwise every caption is a candidate. Needs one right
            video for each text. Both are the same where every video has one caption.

    A text's rank is that of the best of its right videos, and a video's that of the best of its captions: one more than the
    number of wrong candidates whose score is at least as high. So a tie counts against the method, and a similarity that is
    constant has the last rank everywhere. (Published code sorts: X-Pool's ties fall as the sort leaves them, CLIP4Clip's
    and DRL's count a tied query once for each place it might have. Without ties all are the same.)

    Returns `{"text_to_video": {"R@1", "R@5", "R@10", "MdR", "MnR", "queries"}, "video_to_text": ...}`. The median of an even
    number of ranks is the mean of the two in the middle.

    `ValueError` names text and video of a similarity that is NaN, and what does not fit; infinite ones are compared.
    """
    for_texts, for_videos = _ranks(similarity, text_video, group_captions)
    return {"text_to_video": _summary(for_texts), "video_to_text": _summary(for_videos)}


def _summary(ranks: Array) -> dict[str, float]:
    recall = {f"R@{k}": float(100 * np.mean(ranks <= k)) for k in (1, 5, 10)}
    return recall | {"MdR": float(np.median(ranks)), "MnR": float(ranks.mean()), "queries": len(ranks)}


def _ranks(similarity: Any, text_video: Any, group_captions: bool) -> tuple[Array, Array]:
    """The ranks of all texts with a right video, and of all videos with a caption."""
    walk = similarity if callable(similarity) else lambda: _rows(similarity)
    pairs = None if text_video is None else _pairs(text_video)
    first, count = 0, (0, 0)
    for block in map(_plain, walk()):
        if not first:
            count, text, video = _fit(pairs, block, group_captions)
            right = np.empty(len(text), block.dtype)
        _check(block, first, count, right.dtype)
        begin, end = np.searchsorted(text, (first, first + len(block)))
        right[begin:end] = block[text[begin:end] - first, video[begin:end]]
        first += len(block)
    if not first:
        raise ValueError("similarity is empty: there is nothing to rank")
    if first != count[0]:
        raise ValueError(f"similarity has {first} rows, but there are {count[0]} texts")

    best_text, best_video = (np.full(size, _least(right.dtype), right.dtype) for size in count)
    np.maximum.at(best_text, text, right)
    np.maximum.at(best_video, video, right)
    ahead_text, ahead_video = (np.zeros(size, np.int64) for size in count)
    rivals = np.zeros((count[1], count[1]) if group_captions else (0, 0), bool)  # [others, videos]
    first = 0
    for block in map(_plain, walk()):
        _check(block, first, count, right.dtype)
        rows = slice(first, first + len(block))
        ahead_text[rows] = np.count_nonzero(block >= best_text[rows, None], axis=1)
        reaches = block >= best_video
        if group_captions:  # text holds every row once here, so video is by row
            order = np.argsort(video[rows], kind="stable")
            owner, begin = np.unique(video[rows][order], return_index=True)
            rivals[owner] |= np.logical_or.reduceat(reaches[order], begin, axis=0)
        else:
            ahead_video += np.count_nonzero(reaches, axis=0)
        first += len(block)
    if first != count[0]:
        raise ValueError(f"similarity has {first} rows when it is walked again, {count[0]} before")

    ahead_text -= np.bincount(text[right >= best_text[text]], minlength=count[0])  # right ones are not in the way
    if group_captions:
        ahead_video = rivals.sum(0) - rivals.diagonal()
    else:
        ahead_video -= np.bincount(video[right >= best_video[video]], minlength=count[1])
    return ahead_text[np.unique(text)] + 1, ahead_video[np.unique(video)] + 1


def _rows(similarity: Any) -> Iterator[Any]:
    """Blocks of rows of a whole ``similarity``."""
    if not isinstance(similarity, (np.ndarray, torch.Tensor)):
        similarity = np.asarray(similarity)
    if similarity.ndim != 2:
        raise ValueError(f"similarity must be [A, V], got {list(similarity.shape)}")
    step = max(1, ENTRIES // max(1, similarity.shape[1]))
    for first in range(0, len(similarity), step):
        yield similarity[first : first + step]


def _plain(block: Any) -> Array:
    """A block as NumPy has it; bfloat16, which it has not, as float32."""
    if isinstance(block, torch.Tensor):
        block = block.detach().cpu()
        block = (block.float() if block.dtype is torch.bfloat16 else block).numpy()
    block = np.asarray(block)
    if block.dtype.kind not in "fiu":
        raise TypeError(f"similarity must be real numbers, got {block.dtype}")
    return block


def _check(block: Array, first: int, count: tuple[int, int], dtype: Any) -> None:
    """``ValueError`` if ``block``, whose rows begin at ``first``, is none of a similarity of ``count`` texts and videos."""
    if block.ndim != 2 or block.shape[1] != count[1]:
        raise ValueError(f"similarity's rows from {first} on must be [a, {count[1]}], got {list(block.shape)}")
    if first + len(block) > count[0]:
        raise ValueError(f"similarity has at least {first + len(block)} rows, but there are {count[0]} texts")
    if block.dtype != dtype:
        raise ValueError(f"similarity's rows from {first} on are {block.dtype}, those before {dtype}")
    if (missing := np.isnan(block)).any():
        row, column = np.argwhere(missing)[0]
        raise ValueError(f"similarity of text {first + row} and video {column} is NaN; {missing.sum()} of these rows are")


def _pairs(text_video: Any) -> tuple[int, Array, Array]:
    """The number of texts, and text and video of every right pair, by text; a pair that is named twice is one."""
    if isinstance(text_video, torch.Tensor):
        text_video = text_video.tolist()
    owned = [np.atleast_1d(np.asarray(videos)) for videos in text_video]
    for number, videos in enumerate(owned):
        if videos.ndim != 1 or (videos.dtype.kind not in "iu" and len(videos)):
            raise TypeError(f"text_video must hold a whole number or several a text, got {text_video[number]!r} for {number}")
    text = np.repeat(np.arange(len(owned)), [len(videos) for videos in owned])
    video = np.concatenate([*owned, np.empty(0, np.int64)]).astype(np.int64)
    pairs = np.unique(np.stack([text, video], 1), axis=0)
    return len(owned), pairs[:, 0], pairs[:, 1]


def _fit(pairs: tuple[int, Array, Array] | None, block: Array, group_captions: bool) -> tuple[tuple[int, int], Array, Array]:
    """The numbers of texts and videos, and the right pairs; ``block`` is the first of the similarity."""
    videos = block.shape[-1] if block.ndim else 0
    texts, text, video = pairs or (videos, np.arange(videos), np.arange(videos))
    if outside := video[(video < 0) | (video >= videos)].tolist():
        raise ValueError(f"text_video names video {outside[0]}; similarity has {videos}, numbered from 0")
    if not len(text):
        raise ValueError("text_video has no right pair, so there is no query")
    if group_captions and not np.array_equal(text, np.arange(texts)):
        raise ValueError("group_captions=True needs one right video for each text in text_video")
    return (texts, videos), text, video


def _least(dtype: Any) -> Any:
    return -np.inf if dtype.kind == "f" else np.iinfo(dtype).min
