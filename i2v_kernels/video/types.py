"""What every decoder says about a file, and what it is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

from torch import Tensor

StrPath = str | os.PathLike[str]
Size = int | tuple[int, int] | None
VERSION = 2  # of how an index is made: stored ones of another are made anew


class Mark(NamedTuple):
    """A place in a file where decoding can begin.

    Attributes:
        time: what to seek to, in units of the stream.
        crc: CRC-32 of the packet there, by which it is known.
        skip: frames that the decoder gives before the one that is meant.
    """

    time: int
    crc: int
    skip: int = 0


@dataclass(frozen=True)
class VideoIndex:
    """The frames of a video file; frame ``i`` is the i-th that its decoder gives from the start, which is the order of display.

    Attributes:
        count: number of frames, counted, whatever the header says; decoding may find fewer (`VideoError.decodable`).
        pts: presentation time of every frame, ascending, in units of ``time_base``. Where the file's clock goes back, as in
            recordings joined end to end, times go on as if it did not. A file without times has 0, 1, 2, ... in units of one
            frame at its average rate.
        key_frames: numbers of the frames that decoding is proven to give right if it begins there, ascending.
        codec: FFmpeg's name of the codec: ``h264``, ``hevc``, ``vp9``, ``av1``, ...
        pix_fmt: FFmpeg's name of the pixel format in the file.
        width, height: pixels as displayed, after rotation (non-square pixels are not stretched).
        rotation: degrees counter-clockwise, 0, 90, 180 or 270, that the stored picture is turned by for display.
        time_base: seconds per unit of ``pts``.
        counted: why frames are not found by their times but counted, from the last of ``key_frames`` on; None where each packet
            is proven to be one frame, shown at its own time.
        skipped: packets that the container says not to show, as an edit list does; they are not counted.
        damage: what is visibly wrong with a file that decodes all the same, e.g. that it is truncated; else None.
        marks: how to get to each of ``key_frames``.
        mirrored: the picture is mirrored left to right for display, after it was turned.
        stream: the number of the video's stream in the file: the one marked default, else the first with motion.
        streams: how many streams of video, cover pictures included, the file has.
        pixel_aspect: width of a pixel by its height, as displayed; 1 if they are square or the file does not say.
        color_space: the matrix from YUV to RGB, as ITU-T H.273 numbers it: 1 is BT.709, 2 not told, 5 and 6 BT.601, 9 BT.2020.
        color_range: that of the values, as FFmpeg numbers them: 0 is not told, 1 from 16 to 235, 2 from 0 to 255.
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
    counted: str | None = None
    skipped: int = 0
    damage: str | None = None
    marks: tuple[Mark, ...] = ()
    mirrored: bool = False
    stream: int = 0
    streams: int = 1
    pixel_aspect: Fraction = Fraction(1)
    color_space: int = 2
    color_range: int = 0

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

    def decode(self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None) -> Tensor:
        """Decode frames of ``path``; see `i2v_kernels.video.decode`.

        Asked for others where only the first n frames decode, it raises a VideoError with ``decodable=n``.
        """
