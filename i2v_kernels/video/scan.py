"""The index of a file: which frames it has, when each is shown, and from where each can be decoded for certain.

The packets are read once. Where these prove (see `bitstream`) that each is one frame, shown at its own time, frames are found
by their times behind a key frame. Every other file is decoded once, and its frames are counted (see `counting`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple
from zlib import crc32

from .bitstream import (
    Av1Pictures,
    IntraPictures,
    JpegPictures,
    Picture,
    Pictures,
    UnprovableError,
    Vp8Pictures,
    Vp9Pictures,
)
from .counting import count
from .errors import VideoError
from .nal import H264Pictures, HevcPictures
from .opening import decoded, failures, opened, reason_of
from .types import Mark, StrPath, VideoIndex

_READERS: dict[str, type[Pictures]] = {
    "h264": H264Pictures, "hevc": HevcPictures, "vp8": Vp8Pictures, "vp9": Vp9Pictures, "av1": Av1Pictures,
    "mjpeg": JpegPictures,
    **dict.fromkeys(("png", "prores", "dnxhd", "rawvideo", "huffyuv", "ffvhuff", "v210"), IntraPictures),
}  # fmt: skip
_STORED = {"mov", "mp4", "matroska", "webm"}  # containers in which each packet carries its time of display


def _pictures_of(container: Any, stream: Any) -> Pictures:
    """The reader of a stream's packets; an `UnprovableError` where no packet could prove enough."""
    codec, formats = stream.codec_context.codec.canonical_name, set(container.format.name.split(","))
    reader = _READERS.get(codec)
    if not (formats & _STORED or (reader in (IntraPictures, JpegPictures) and "avi" in formats)):
        raise UnprovableError(f"{container.format.name} files do not store the time of each frame")
    if reader is None:
        raise UnprovableError(f"{codec} pictures cannot be told by their packets")
    return reader(stream.codec_context.extradata or b"")


class _Packet(NamedTuple):
    pts: int
    picture: Picture
    discard: bool
    crc: int | None  # of one that decoding can begin at, and that a seek leads to


def read_index(path: StrPath) -> VideoIndex:
    """See `i2v_kernels.video.index`."""
    with opened(path) as (container, stream):
        try:
            first, found = _by_times(path, container, stream)
            return VideoIndex(**found, **_looks(path, container, stream, first))
        except UnprovableError as error:
            why, number = str(error), stream.index
    with opened(path, number) as (container, stream):
        first, found = count(path, container, stream, why)
        return VideoIndex(**found, **_looks(path, container, stream, first))


def _by_times(path: StrPath, container: Any, stream: Any) -> tuple[Any, dict[str, Any]]:
    """A frame, and what the index says of all."""
    reader = _pictures_of(container, stream)
    first, packets, trouble, damage, broken = None, list[_Packet](), "", None, 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                if packet.pts is not None:
                    raise UnprovableError("it has empty packets")
                continue
            if packet.is_corrupt:
                broken += 1
                continue
            packets.append(_read(reader, packet))
            # What a frame looks like is told by frames only, so one is decoded; that also finds the files where none can be.
            if first is None:
                try:
                    first = next(iter(packet.decode()), None)
                except failures() as error:
                    trouble = f": {reason_of(error)}"
    except failures() as error:
        trouble = f": {reason_of(error)}"
        damage = f"damaged after {len(packets)} frames{trouble}"
    first = first or next(decoded([], stream), None)
    if first is None or not packets:
        raise VideoError(path, f"no frame decodes{trouble}")
    _prove(packets, reader, "mov" in container.format.name)
    shown = [packet for packet in packets if packet.picture.shown and not packet.discard]
    shown.sort(key=lambda packet: packet.pts)
    if not shown:
        raise VideoError(path, "none of its frames are to be shown")
    promised = len(stream.index_entries)
    if damage is None and (len(packets) < promised or broken):
        damage = f"truncated: {len(packets)} of {max(promised, stream.frames)} frames are there"
    marks = {i: Mark(packet.pts, packet.crc) for i, packet in enumerate(shown) if packet.crc is not None}
    return first, {
        "count": len(shown),
        "pts": tuple(packet.pts for packet in shown),
        "key_frames": tuple(marks),
        "marks": tuple(marks.values()),
        "time_base": stream.time_base,
        "skipped": sum(packet.discard for packet in packets),
        "damage": damage,
    }


def _read(reader: Pictures, packet: Any) -> _Packet:
    data = memoryview(packet)
    picture = reader.read(data)
    if packet.pts is None:
        raise UnprovableError("it has packets without a time")
    found = picture.start and packet.is_keyframe  # by a seek, which leads to what the container takes for key frames
    return _Packet(packet.pts, picture, packet.is_discard, crc32(data) if found else None)


def _prove(packets: list[_Packet], reader: Pictures, told_by_container: bool) -> None:
    """Raises an UnprovableError unless sorting the packets by their times gives the decoder's frames."""
    if not packets[0].picture.start:
        raise UnprovableError("it does not begin with a key frame")
    if any(packet.picture.shown > 1 for packet in packets):
        raise UnprovableError("it has packets of several frames")
    shown = [(packet.pts, packet.picture.order or (0, place)) for place, packet in enumerate(packets) if packet.picture.shown]
    in_time = sorted(shown)
    if any(a[0] == b[0] for a, b in pairwise(in_time)):
        raise UnprovableError("frames share a time")
    if any(a[1] >= b[1] for a, b in pairwise(in_time)):
        raise UnprovableError("the times of its packets are not those at which its frames are shown")
    # A decoder that has to find out how many frames to hold back gives the first ones out of order, or loses them.
    if not told_by_container and _depth([pts for pts, _ in shown]) > reader.reorder_depth:
        raise UnprovableError("it does not say how many frames the decoder has to hold back")


def _depth(times: Sequence[int]) -> int:
    """How many frames are decoded before one that is shown before them, at most."""
    latest: list[int] = []  # the 64 that are shown last, of those so far
    deepest = 0
    for pts in times:
        deepest = max(deepest, len(latest) - bisect_left(latest, pts))
        insort(latest, pts)
        del latest[:-64]
    return deepest


def _looks(path: StrPath, container: Any, stream: Any, frame: Any) -> dict[str, Any]:
    """What the index says of the pictures."""
    rotation, mirrored = _turns(path, frame)
    height, width = (frame.width, frame.height) if rotation % 180 else (frame.height, frame.width)
    pixel = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    return {
        "codec": stream.codec_context.codec.canonical_name,
        "pix_fmt": frame.format.name,
        "width": width,
        "height": height,
        "rotation": rotation,
        "mirrored": mirrored,
        "stream": stream.index,
        "streams": len(container.streams.video),
        "pixel_aspect": 1 / pixel if rotation % 180 else pixel,
        "color_space": int(frame.colorspace),
        "color_range": int(frame.color_range),
    }


def _turns(path: StrPath, frame: Any) -> tuple[int, bool]:
    """(degrees counter-clockwise, mirrored afterwards) of a frame's display matrix, as the ffmpeg program shows it."""
    data = next((bytes(side) for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    if data is None or len(data) < 36:
        return 0, False
    a, b, _, c, d = (int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True) for i in range(5))
    wide, high = math.hypot(a, c), math.hypot(b, d)
    if not wide or not high:
        return 0, False
    turned = round(math.degrees(math.atan2(b / high, a / wide)))  # clockwise
    quarter, apart = divmod(turned + 2, 90)
    if apart > 4:
        raise VideoError(path, f"is to be shown turned by {turned} degrees, which is not a multiple of 90")
    if quarter % 4 == 0:
        return (180, True) if d < 0 else (0, False)
    if quarter % 4 == 1:
        return (270, True) if c > 0 else (270, False)
    if quarter % 4 == 3:
        return (90, True) if c < 0 else (90, False)
    return {(True, True): (180, False), (True, False): (0, True), (False, True): (180, True)}.get((a < 0, d < 0), (0, False))
