"""What every decoder says about a file, and what it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from torch import Tensor

StrPath = str | os.PathLike[str]
Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video file, found by reading its packets; frame ``i`` is the i-th in order of display.

    Attributes:
        count: number of frames, counted, whatever the header says; decoding may find fewer (`VideoError.decodable`).
        pts: presentation time of every frame, ascending, in units of ``time_base``. A file without usable times has
            0, 1, 2, ... in units of one frame at its average rate.
        key_frames: frame numbers of the key frames, ascending.
        codec: FFmpeg's name of the codec: ``h264``, ``hevc``, ``vp9``, ``av1``, ...
        pix_fmt: FFmpeg's name of the pixel format in the file.
        width, height: pixels as displayed, after rotation (non-square pixels are not stretched).
        rotation: degrees counter-clockwise, 0, 90, 180 or 270, that the stored picture is turned by for display.
        time_base: seconds per unit of ``pts``.
        sequential: frames cannot be found by their pts (missing, repeated, or not starting with a key frame), so that
            decoding starts at the first frame and counts.
        skipped: packets that the container says not to show, as an edit list does; they are not counted.
        damage: what is visibly wrong with a file that decodes all the same, e.g. that it is truncated; else None.
    """

    count: int
    pts: tuple[int, ...]
    key_frames: tuple[int, ...]
    codec: str
    pix_fmt: str
    width: int
    height: int
    rotation: int
    time_base: Fraction
    sequential: bool = False
    skipped: int = 0
    damage: str | None = None

    def seconds(self, indices: Iterable[int]) -> list[float]:
        """Presentation times, in seconds, of the frames ``indices``."""
        return [float(self.pts[i] * self.time_base) for i in indices]

    def output_size(self, size: Size = None) -> tuple[int, int]:
        """``(height, width)`` of the decoded frames: as displayed (None), short side (int), or exactly ``size``."""
        if size is None:
            return self.height, self.width
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size,)
        if len(sides) not in (1, 2) or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"size must be a positive int or (height, width), got {size!r}")
        if len(sides) == 2:
            return sides
        scale = sides[0] / min(self.height, self.width)
        return max(sides[0], round(self.height * scale)), max(sides[0], round(self.width * scale))


class Decoder(Protocol):
    """What a decoder has to offer to be registered with `register_backend`; it must be picklable, and hold no files."""

    def index(self, path: StrPath) -> VideoIndex:
        """Read the index of ``path``; see `i2v_kernels.video.index`."""

    def decode(
        self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None
    ) -> Tensor:
        """Decode frames of ``path``; see `i2v_kernels.video.decode`.

        Asked for others where only the first n frames decode, it raises a VideoError with ``decodable=n``.
        """
