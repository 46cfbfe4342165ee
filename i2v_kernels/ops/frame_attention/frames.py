"""Which frames the queries of a frame attend to: offsets for all heads or for each, or all frames."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

FARTHEST = 2**24  # offsets beyond lie outside every clip


def head_groups(offsets: Sequence[int], counts: Sequence[int], heads: int) -> list[tuple[int, int, tuple[int, ...]]]:
    """``(first head, last head + 1, offsets)`` of heads that attend to the same frames; no offsets: to all frames.

    ``counts``: how many of ``offsets`` are whose, head after head; empty where all heads have the same.
    """
    if not counts:
        return [(0, heads, tuple(offsets))]
    each, first = [], 0
    for count in counts:
        each.append(tuple(offsets[first : first + count]))
        first += count
    found, first = [], 0
    for own, group in groupby(each):
        last = first + len(list(group))
        found.append((first, last, own))
        first = last
    return found


def sources(frames: int, offsets: Sequence[int], edges: str) -> list[list[int]]:
    """For each frame the frames that its queries attend to, -1 for one outside the clip."""
    if not offsets:
        return [list(range(frames))] * frames
    found = []
    for t in range(frames):
        seen = [t + offset for offset in offsets]
        if edges == "clamp":
            seen = [min(max(s, 0), frames - 1) for s in seen]
        found.append([s if 0 <= s < frames else -1 for s in seen])
    return found
