"""Turns the plan of a batch into a batch; runs in the loader's worker processes and keeps no open files."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import VideoError
from .plan import Entry, Request
from .sampling import Sampler
from .sources import Video
from .types import Decoder, VideoIndex

MAX_REPLACEMENTS = 10
MAX_CACHED_INDICES = 4096
# Scaled to a given short side, a damaged header's 1 x 16384 pixels would take all memory.
MAX_ASPECT = 32


class Result(NamedTuple):
    """What became of batch ``number``: its fields (None if nothing is left of it), bad files, an error to raise.

    Only the frames are a tensor: each tensor sent between processes keeps a file open for as long as it lives, and
    labels are often kept for a whole epoch.
    """

    number: int
    fields: dict[str, Any] | None
    bad: list[tuple[str, str]]
    error: VideoError | None


class Clip(NamedTuple):
    """A decoded clip, before cropping; ``damage`` as in `VideoIndex`."""

    frames: Tensor
    indices: list[int]
    pts: list[float]
    damage: str | None


class ClipReader(Dataset):
    """``reader[request]`` is the `Result`; the same for the same request, whatever was read before."""

    def __init__(
        self,
        videos: list[Video],
        decoder: Decoder,
        sampler: Sampler,
        frames: int,
        size: int,
        views: tuple[int, int],
        seed: int,
        on_error: str,
    ) -> None:
        self.videos, self.decoder, self.sampler = videos, decoder, sampler
        self.frames, self.size, self.views, self.seed, self.on_error = frames, size, views, seed, on_error
        self._indices: dict[str, tuple[tuple[int, int] | None, VideoIndex]] = {}
        self._last: tuple[tuple[int, int, int], Clip] | None = None

    def __getitem__(self, request: Request) -> Result:
        bad: list[tuple[str, str]] = []
        rows, crops = [], []
        self._last = None
        for entry in request.entries:
            try:
                item, clip = self._first_good(entry, request.epoch, bad)
            except VideoError as error:
                if self.on_error == "skip":
                    continue
                return Result(request.number, None, bad, error)
            rows.append((item, entry.view, entry.valid and item == entry.item, clip))
            crops.append(self._crop(clip.frames, entry.view % self.views[1]))
        if not rows:
            return Result(request.number, None, bad, None)
        items, views, valid, clips = zip(*rows)
        fields = {
            "frames": torch.stack(crops),
            "frame_index": np.array([clip.indices for clip in clips], np.int64),
            "pts": np.array([clip.pts for clip in clips], np.float64),
            "label": np.array([self.videos[item].label for item in items], np.int64),
            "item": np.array(items, np.int64),
            "view": np.array(views, np.int64),
            "valid": np.array(valid, np.bool_),
            "path": [self.videos[item].path for item in items],
        }
        return Result(request.number, fields, bad, None)

    def _first_good(self, entry: Entry, epoch: int, bad: list[tuple[str, str]]) -> tuple[int, Clip]:
        """The entry's clip or, with ``on_error="replace"``, that of the next video that has one."""
        attempts = 1 + (min(MAX_REPLACEMENTS, len(self.videos) - 1) if self.on_error == "replace" else 0)
        first: VideoError | None = None
        for step in range(attempts):
            item = (entry.item + step) % len(self.videos)
            try:
                clip = self._read(item, entry.view // self.views[1], epoch)
            except VideoError as error:
                bad.append((error.path, error.reason))
                first = first or error
                continue
            if clip.damage is not None:
                bad.append((self.videos[item].path, clip.damage))
            return item, clip
        assert first is not None
        if attempts == 1:
            raise first
        raise VideoError(first.path, f"{first.reason}; nor can the next {attempts - 1} videos be used, see report()")

    def _read(self, item: int, clip: int, epoch: int) -> Clip:
        # The spatial views of a clip follow each other: decode it once.
        if self._last is None or self._last[0] != (item, clip, epoch):
            self._last = (item, clip, epoch), self._decode(item, clip, epoch)
        return self._last[1]

    def _decode(self, item: int, clip: int, epoch: int) -> Clip:
        path = self.videos[item].path
        index = self._index(path)
        if max(index.width, index.height) > MAX_ASPECT * min(index.width, index.height):
            raise VideoError(path, f"its sides, {index.width} x {index.height}, differ by more than {MAX_ASPECT} times")
        count, damage = index.count, index.damage
        for last_try in (False, True):
            rng = np.random.default_rng([self.seed, epoch, 1 + item, clip])
            indices = self.sampler(count, self.frames, rng, clip=clip, clips=self.views[0])
            try:
                frames = self.decoder.decode(path, indices, self.size, index=index)
                break
            except VideoError as error:
                if last_try or not error.decodable:
                    raise
                # Not remembered for the next time: what is read must not depend on what was read before.
                count, damage = error.decodable, f"{error.reason}; used those"
        return Clip(frames, indices, index.seconds(indices), damage)

    def _index(self, path: str) -> VideoIndex:
        try:
            status = os.stat(path)
            stamp = status.st_size, status.st_mtime_ns
        except OSError:
            stamp = None
        if path not in self._indices or self._indices[path][0] != stamp:
            if len(self._indices) >= MAX_CACHED_INDICES:
                self._indices.pop(next(iter(self._indices)))
            self._indices[path] = stamp, self.decoder.index(path)
        return self._indices[path][1]

    def _crop(self, frames: Tensor, spatial: int) -> Tensor:
        """``[T, size, size, 3]``: the centre or, of several spatial views, one of those spread along the long side."""
        share = spatial / (self.views[1] - 1) if self.views[1] > 1 else 0.5
        top, left = (round((side - self.size) * share) for side in frames.shape[1:3])
        return frames[:, top : top + self.size, left : left + self.size]
