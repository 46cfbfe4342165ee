"""Turns the plan of a batch into a batch; runs in the loader's worker processes and keeps no open files."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import VideoError
from .index_cache import IndexCache
from .plan import Entry, Request
from .sampling import Sampler, draw
from .sources import Video
from .types import Decoder, StrPath, VideoIndex

MAX_REPLACEMENTS = 10
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


class ClipPlan(NamedTuple):
    """What to decode: frames ``indices``, scaled to ``size`` (height, width); of that the square with its corner at ``corner``
    (top, left), mirrored if ``flip``. All as displayed. ``damage`` as in `VideoIndex`.
    """

    path: str
    table: VideoIndex
    indices: list[int]
    size: tuple[int, int]
    corner: tuple[int, int]
    flip: bool
    damage: str | None


class Clip(NamedTuple):
    """A decoded clip, before cropping, and where its frames were found at last."""

    frames: Tensor
    plan: ClipPlan


class Outcome(NamedTuple):
    """What became of an entry: the video that is shown and its frames ``[T, size, size, 3]``, or an error."""

    item: int
    plan: ClipPlan | None
    frames: Tensor | None
    error: VideoError | None = None


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
        crop: str = "center",
        flip: bool = False,
        index_cache: StrPath | None = None,
    ) -> None:
        self.videos, self.decoder, self.sampler = videos, decoder, sampler
        self.frames, self.size, self.views, self.seed, self.on_error = frames, size, views, seed, on_error
        self.crop, self.flip = crop, flip
        self.index = IndexCache(decoder.index, index_cache)
        self._last: tuple[tuple[int, int, int], Clip] | None = None

    def __getitem__(self, request: Request) -> Result:
        bad: list[tuple[str, str]] = []
        self._last = None
        return self.batch(request, [self.outcome(entry, request.epoch, bad) for entry in request.entries], bad)

    def batch(self, request: Request, outcomes: list[Outcome], bad: list[tuple[str, str]]) -> Result:
        """The batch of a request from what became of each of its entries."""
        error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
        if error is not None and self.on_error != "skip":
            return Result(request.number, None, bad, error)
        pairs = [(entry, outcome) for entry, outcome in zip(request.entries, outcomes) if outcome.error is None]
        if not pairs:
            return Result(request.number, None, bad, None)
        items = [outcome.item for _, outcome in pairs]
        plans = [outcome.plan for _, outcome in pairs if outcome.plan is not None]
        fields = {
            "frames": stacked([outcome.frames for _, outcome in pairs if outcome.frames is not None]),
            "frame_index": np.array([plan.indices for plan in plans], np.int64),
            "pts": np.array([plan.table.seconds(plan.indices) for plan in plans], np.float64),
            "label": np.array([self.videos[item].label for item in items], np.int64),
            "item": np.array(items, np.int64),
            "view": np.array([entry.view for entry, _ in pairs], np.int64),
            "valid": np.array([entry.valid and outcome.item == entry.item for entry, outcome in pairs], np.bool_),
            "path": [self.videos[item].path for item in items],
        }
        return Result(request.number, fields, bad, None)

    def plan(self, entry: Entry, epoch: int, count: int | None = None) -> ClipPlan:
        """What an entry asks of its video, or of the ``count`` first frames of it; without reading it but for its index."""
        clip, spatial = divmod(entry.view, self.views[1])
        path = self.videos[entry.item].path
        index = self.index(path)
        if max(index.width, index.height) > MAX_ASPECT * min(index.width, index.height):
            raise VideoError(path, f"its sides, {index.width} x {index.height}, differ by more than {MAX_ASPECT} times")
        times = np.array(index.pts[:count], np.float64) * float(index.time_base)
        rng = np.random.default_rng([self.seed, epoch, 1 + entry.item, clip])
        indices = draw(self.sampler, times, self.frames, rng, clip, self.views[0])
        size = index.output_size(self.size)
        share = spatial / (self.views[1] - 1) if self.views[1] > 1 else 0.5
        across = np.random.default_rng([self.seed, epoch, 1 + entry.item, entry.view, 1])
        shares = across.random(2) if self.crop == "random" else np.array([share, share])
        top, left = (round((side - self.size) * float(share)) for side, share in zip(size, shares))
        flip = self.flip and bool(across.integers(2))
        return ClipPlan(path, index, indices, size, (top, left), flip, index.damage)

    def outcome(self, entry: Entry, epoch: int, bad: list[tuple[str, str]]) -> Outcome:
        """The entry's clip or, with ``on_error="replace"``, that of the next video that has one; ``bad`` grows."""
        attempts = 1 + (min(MAX_REPLACEMENTS, len(self.videos) - 1) if self.on_error == "replace" else 0)
        first: VideoError | None = None
        for step in range(attempts):
            item = (entry.item + step) % len(self.videos)
            try:
                clip = self._read(entry._replace(item=item), epoch)
            except VideoError as error:
                bad.append((error.path, error.reason))
                first = first or VideoError(*error.args)  # without its traceback, which holds this frame and all before it
                continue
            if clip.plan.damage is not None:
                bad.append((self.videos[item].path, clip.plan.damage))
            return Outcome(item, clip.plan, self._crop(clip))
        assert first is not None
        if attempts > 1:
            reason = f"{first.reason}; nor can the next {attempts - 1} videos be used, see report()"
            first = VideoError(first.path, reason)
        return Outcome(entry.item, None, None, first)

    def _read(self, entry: Entry, epoch: int) -> Clip:
        # The spatial views of a clip follow each other: decode it once.
        key = entry.item, entry.view // self.views[1], epoch
        if self._last is not None and self._last[0] == key:
            frames, plan = self._last[1]
            place = self.plan(entry, epoch)
            return Clip(frames, plan._replace(corner=place.corner, flip=place.flip))
        clip = self._decode(entry, epoch)
        self._last = key, clip
        return clip

    def _decode(self, entry: Entry, epoch: int) -> Clip:
        plan = self.plan(entry, epoch)
        try:
            return Clip(self.decoder.decode(plan.path, plan.indices, plan.size, index=plan.table), plan)
        except VideoError as error:
            if not error.decodable:
                raise
            # Not remembered for the next time: what is read must not depend on what was read before.
            plan = self.plan(entry, epoch, error.decodable)._replace(damage=f"{error.reason}; used those")
            return Clip(self.decoder.decode(plan.path, plan.indices, plan.size, index=plan.table), plan)

    def _crop(self, clip: Clip) -> Tensor:
        """``[T, size, size, 3]``."""
        top, left = clip.plan.corner
        crop = clip.frames[:, top : top + self.size, left : left + self.size]
        return crop.flip(2) if clip.plan.flip else crop


def stacked(clips: list[Tensor]) -> Tensor:
    """``torch.stack(clips)`` on one device, a GPU if one of them is; what a decoder wrote as one batch is not copied."""
    whole = clips[0]._base
    if whole is not None and len(whole) == len(clips):
        places = [(part.data_ptr(), part.shape, part.stride()) for part in whole]
        if places == [(clip.data_ptr(), clip.shape, clip.stride()) for clip in clips]:
            return whole
    device = next((clip.device for clip in clips if clip.device.type != "cpu"), clips[0].device)
    return torch.stack([clip.to(device, non_blocking=True) for clip in clips])
