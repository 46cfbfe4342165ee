"""The calls of an attention over runs of frames that make up ``frame_attention``: what is computed from offsets alone."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from .frames import sources


class Piece(NamedTuple):
    """Queries of frames [first, last) against ``frames`` that follow each other, from ``key`` on: from a frame further on with
    each frame of queries where they are ``moving``.
    """

    first: int
    last: int
    key: int
    frames: int
    moving: bool


class Plan(NamedTuple):
    """``rounds`` of pieces; the first round has every frame of queries that sees a frame. ``zeros``: how often each frame of
    queries sees a frame of zeros.
    """

    rounds: tuple[tuple[Piece, ...], ...]
    zeros: tuple[int, ...]
    seen: tuple[bool, ...]


@lru_cache(4096)
def plan(frames: int, offsets: tuple[int, ...], edges: str, valid: tuple[bool, ...] | None) -> Plan:
    """Of heads with these offsets, where ``valid`` says which frames are there as keys (None: all)."""
    runs, zeros = [], []
    for seen in sources(frames, offsets, edges):
        runs.append(_runs([s for s in seen if s >= 0 and (valid is None or valid[s])]))
        zeros.append(sum(s < 0 for s in seen) if edges == "zero" else 0)
    rounds = []
    for turn in range(max(map(len, runs))):
        pieces: list[Piece] = []
        for t, own in enumerate(runs):
            if turn < len(own):
                _append(pieces, t, *own[turn])
        rounds.append(tuple(pieces))
    return Plan(tuple(rounds), tuple(zeros), tuple(bool(own) for own in runs))


def _runs(seen: list[int]) -> list[tuple[int, int]]:
    """``(first frame, count)`` of runs of frames that follow each other; a frame is in as many as it is named."""
    left, runs = Counter(seen), []
    while left:
        run: list[int] = []
        for s in sorted(left):
            if not run or s == run[-1] + 1:
                run.append(s)
            else:
                break
        left -= Counter(run)
        runs.append((run[0], len(run)))
    return runs


def _append(pieces: list[Piece], t: int, key: int, count: int) -> None:
    """One more frame of queries: with those before it, if its keys move on as theirs do."""
    if pieces and pieces[-1].last == t and pieces[-1].frames == count:
        first, last, from_key, _, moving = pieces[-1]
        alone = last - first == 1
        if key == from_key + (t - first) and (moving or alone):
            pieces[-1] = Piece(first, t + 1, from_key, count, True)
            return
        if key == from_key and (not moving or alone):
            pieces[-1] = Piece(first, t + 1, from_key, count, False)
            return
    pieces.append(Piece(t, t + 1, key, count, True))
