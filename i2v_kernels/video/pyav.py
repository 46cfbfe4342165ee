"""The default decoder: PyAV (FFmpeg's libraries in one wheel), frame exact, one thread.

`PyAVDecoder.index` reads all packets once; the sorted presentation times are the table of frames. `PyAVDecoder.decode`
seeks to the key frame before each wanted frame and decodes up to it. A frame that does not carry exactly the time in
the table means that seeking in this file is not exact: the clip is decoded again from the first frame, by counting.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from operator import index as to_int
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import VideoError, import_av
from .types import Size, StrPath, VideoIndex

# Files come from anywhere: a playlist must not reach other hosts, half a packet is no frame, bad metadata is no reason.
_OPEN = {
    "container_options": {"protocol_whitelist": "file", "fflags": "+discardcorrupt"},
    "metadata_errors": "ignore",
}
# Where FFmpeg's "not for reference" means for none at all; in HEVC it means within one temporal layer.
_DROPS_SAFELY = {"h264", "mpeg4"}


class _NotExactError(Exception):
    """Seeking did not lead to the wanted frame."""


class PyAVDecoder:
    """Decodes on the CPU with PyAV; see `i2v_kernels.video.index` and `i2v_kernels.video.decode`."""

    def index(self, path: StrPath) -> VideoIndex:
        with _opened(path) as (container, stream):
            return _read_index(path, container, stream)

    def decode(
        self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None
    ) -> Tensor:
        table = self.index(path) if index is None else index
        places: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            if not 0 <= to_int(i) < table.count:
                raise IndexError(f"decode: indices[{place}]={i} is not in 0..{table.count - 1}, the frames of {path}")
            places.setdefault(to_int(i), []).append(place)
        height, width = table.output_size(size)
        out = np.empty((len(indices), height, width, 3), np.uint8)
        wanted = sorted(places)
        if table.sequential:
            _fill(out, places, path, table, _sequential, wanted)
        elif wanted:
            try:
                _fill(out, places, path, table, _seeking, wanted)
            except (_NotExactError, VideoError):
                _fill(out, places, path, table, _sequential, wanted)
        return torch.from_numpy(out)


class OverPyAV(PyAVDecoder):
    """A decoder for what it can do exactly, and PyAV for the rest, and for the reasons of what nobody can."""

    def exact(self, path: StrPath, wanted: list[int], size: Size, table: VideoIndex) -> Tensor | None:
        """The frames ``wanted``, which the index has, or None."""
        raise NotImplementedError

    def decode(
        self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None
    ) -> Tensor:
        table = self.index(path) if index is None else index
        wanted = [to_int(i) for i in indices]
        frames = None
        if wanted and min(wanted) >= 0 and max(wanted) < table.count:
            frames = self.exact(path, wanted, size, table)
        return super().decode(path, wanted, size, index=table) if frames is None else frames


def _not_a_file(path: StrPath) -> str | None:
    try:
        status = os.stat(path)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    if stat.S_ISDIR(status.st_mode):
        return "is a directory"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    return None if status.st_size else "empty file"


@contextmanager
def _opened(path: StrPath) -> Iterator[tuple[Any, Any]]:
    """The open container and its video stream; whatever FFmpeg finds wrong leaves as a VideoError."""
    av = import_av()
    if (reason := _not_a_file(path)) is not None:
        raise VideoError(path, reason)
    try:
        with av.open(os.path.abspath(os.fspath(path)), **_OPEN) as container:
            # The cover picture of a song is a video stream too.
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise VideoError(path, "has no video stream")
            if streams[0].codec_context is None:
                raise VideoError(path, "no decoder for its codec")
            # Threads pay off across files, in worker processes; inside one they oversubscribe the machine.
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]
    except _failures() as error:
        raise VideoError(path, f"cannot be read: {_reason(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What PyAV raises at damaged files; fuzzing it found more than FFmpeg's errors."""
    return import_av().error.FFmpegError, OSError, ValueError, LookupError, ArithmeticError, MemoryError, RuntimeError


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _read_index(path: StrPath, container: Any, stream: Any) -> VideoIndex:
    first, trouble, damage, seen = None, "", None, 0
    packets: list[tuple[int | None, bool]] = []
    try:
        for packet in container.demux(stream):
            if packet.size:
                seen += 1
                if not packet.is_discard:
                    packets.append((packet.pts, packet.is_keyframe))
            # Rotation is told by frames only, so one frame is decoded; that also finds the files where none can be.
            if first is None:
                try:
                    first = next(iter(packet.decode()), None)
                except _failures() as error:
                    trouble = f": {_reason(error)}"
    except _failures() as error:
        trouble = f": {_reason(error)}"
        damage = f"damaged after {seen} frames{trouble}"
    if first is None or not packets:
        raise VideoError(path, f"no frame decodes{trouble}")
    rotation = round(first.rotation / 90) * 90 % 360
    height, width = first.height, first.width
    if rotation % 180:
        height, width = width, height

    time_base = stream.time_base
    if any(pts is None for pts, _ in packets):
        time_base = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
        packets = [(i, key) for i, (_, key) in enumerate(packets)]
        usable = False
    else:
        packets.sort()
        usable = all(a[0] != b[0] for a, b in pairwise(packets)) and packets[0][1]
    promised = len(stream.index_entries)
    if damage is None and seen < promised:
        damage = f"truncated: {seen} of {max(promised, stream.frames)} frames are there"
    return VideoIndex(
        count=len(packets),
        pts=tuple(pts for pts, _ in packets if pts is not None),
        key_frames=tuple(i for i, (_, key) in enumerate(packets) if key),
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=first.format.name,
        width=width,
        height=height,
        rotation=rotation,
        time_base=time_base,
        sequential=not usable,
        skipped=seen - len(packets),
        damage=damage,
    )


def _fill(
    out: np.ndarray, places: dict[int, list[int]], path: StrPath, table: VideoIndex, method: Any, wanted: list[int]
) -> None:
    """Write the frames that ``method`` finds to their places in ``out``, scaled and rotated."""
    av = import_av()
    height, width = out.shape[1:3]
    if table.rotation % 180:
        height, width = width, height
    reformatter = av.video.reformatter.VideoReformatter()
    with _opened(path) as (container, stream):
        for i, frame in method(path, table, container, stream, wanted):
            image = reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
            out[places[i]] = np.rot90(image, table.rotation // 90)


def _seeking(
    path: StrPath, table: VideoIndex, container: Any, stream: Any, wanted: list[int]
) -> Iterator[tuple[int, Any]]:
    times = {table.pts[i] for i in wanted}

    def decoded() -> Iterator[Any]:
        dropping = None
        for packet in container.demux(stream):
            unwanted = packet.pts not in times
            if unwanted != dropping and table.codec in _DROPS_SAFELY:
                dropping = unwanted  # only frames that no other is predicted from
                stream.codec_context.skip_frame = "NONREF" if dropping else "DEFAULT"
            yield from packet.decode()

    frames, reached = decoded(), 0
    for i in wanted:
        key = table.key_frames[bisect_right(table.key_frames, i) - 1]
        if key > reached:
            container.seek(table.pts[key], stream=stream)
            frames = decoded()
        frame = next((frame for frame in frames if frame.pts is None or frame.pts >= table.pts[i]), None)
        if frame is None or frame.pts != table.pts[i]:
            raise _NotExactError
        yield i, frame
        reached = i


def _sequential(
    path: StrPath, table: VideoIndex, container: Any, stream: Any, wanted: list[int]
) -> Iterator[tuple[int, Any]]:
    found, trouble, missing = 0, "", set(wanted)
    try:
        for frame in container.decode(stream):
            if found in missing:
                yield found, frame
                missing.remove(found)
                if not missing:
                    return
            found += 1
    except _failures() as error:
        trouble = f": {_reason(error)}"
    if found == 0:
        raise VideoError(path, f"no frame decodes{trouble}")
    if missing:
        raise VideoError(path, f"only the first {found} of {table.count} frames decode{trouble}", decodable=found)
