"""The default decoder: PyAV (FFmpeg's libraries in one wheel), frame exact, one thread.

`PyAVDecoder.index` reads all packets once, and where these do not prove enough decodes the file (see `scan`).
`PyAVDecoder.decode` seeks to the key frame before each wanted frame and decodes up to it. Where that fails all the same,
because the file has changed or is damaged, the clip is decoded again from the first frame, by counting.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import index as to_int
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import VideoError, import_av
from .opening import NotExactError, decoded, failures, opened, packets_from, packets_of, reason_of
from .scan import read_index
from .types import Size, StrPath, VideoIndex


class PyAVDecoder:
    """Decodes on the CPU with PyAV; see `i2v_kernels.video.index` and `i2v_kernels.video.decode`."""

    def index(self, path: StrPath) -> VideoIndex:
        return read_index(path)

    def decode(self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None) -> Tensor:
        table = self.index(path) if index is None else index
        places: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            if not 0 <= to_int(i) < table.count:
                raise IndexError(f"decode: indices[{place}]={i} is not in 0..{table.count - 1}, the frames of {path}")
            places.setdefault(to_int(i), []).append(place)
        height, width = table.output_size(size)
        out = np.empty((len(indices), height, width, 3), np.uint8)
        wanted = sorted(places)
        if wanted:
            try:
                _fill(out, places, path, table, _by_times if table.counted is None else _by_counting, wanted)
            except (NotExactError, VideoError):
                _fill(out, places, path, table, _from_the_start, wanted)
        return torch.from_numpy(out)


class OverPyAV(PyAVDecoder):
    """A decoder for what it can do exactly, and PyAV for the rest, and for the reasons of what nobody can."""

    def exact(self, path: StrPath, wanted: list[int], size: Size, table: VideoIndex) -> Tensor | None:
        """The frames ``wanted``, which the index has, or None."""
        raise NotImplementedError

    def decode(self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None) -> Tensor:
        table = self.index(path) if index is None else index
        wanted = [to_int(i) for i in indices]
        frames = None
        if wanted and min(wanted) >= 0 and max(wanted) < table.count:
            frames = self.exact(path, wanted, size, table)
        return super().decode(path, wanted, size, index=table) if frames is None else frames


def _fill(
    out: np.ndarray, places: dict[int, list[int]], path: StrPath, table: VideoIndex, method: Any, wanted: list[int]
) -> None:
    """Write the frames that ``method`` finds to their places in ``out``, scaled and rotated."""
    av = import_av()
    height, width = out.shape[1:3]
    if table.rotation % 180:
        height, width = width, height
    reformatter = av.video.reformatter.VideoReformatter()
    with opened(path, table.stream) as (container, stream):
        for i, frame in method(path, table, container, stream, wanted):
            image = reformatter.reformat(frame, width, height, "rgb24", threads=1).to_ndarray()
            image = np.rot90(image, table.rotation // 90)
            out[places[i]] = image[:, ::-1] if table.mirrored else image


Found = Iterator[tuple[int, Any]]


def _by_times(path: StrPath, table: VideoIndex, container: Any, stream: Any, wanted: list[int]) -> Found:
    """The frames that carry the times of those wanted."""
    times = {table.pts[i] for i in wanted}

    def thinned(packets: Iterator[Any]) -> Iterator[Any]:
        """H.264 marks pictures that no other is predicted from; in HEVC the mark means within one temporal layer alone."""
        dropping = None
        for packet in packets:
            unwanted = packet.pts not in times
            if unwanted != dropping and table.codec == "h264":
                dropping = unwanted
                stream.codec_context.skip_frame = "NONREF" if dropping else "DEFAULT"
            yield packet

    frames, reached = decoded(thinned(packets_of(container, stream)), stream, _not_exact), 0
    for i in wanted:
        key = bisect_right(table.key_frames, i) - 1
        if key >= 0 and table.key_frames[key] > reached:
            frames = decoded(thinned(packets_from(container, stream, table.marks[key])), stream, _not_exact)
        frame = next((frame for frame in frames if frame.pts is None or frame.pts >= table.pts[i]), None)
        if frame is None or frame.pts != table.pts[i]:
            raise NotExactError
        yield i, frame
        reached = i


def _not_exact(error: Exception) -> None:
    raise NotExactError


def _by_counting(path: StrPath, table: VideoIndex, container: Any, stream: Any, wanted: list[int]) -> Found:
    """The frames that come at their places behind a mark."""
    frames, reached = decoded(packets_of(container, stream), stream), -1
    for i in wanted:
        key = bisect_right(table.key_frames, i) - 1
        if table.key_frames[key] > reached and key > 0:
            mark = table.marks[key]
            frames, reached = decoded(packets_from(container, stream, mark), stream), table.key_frames[key] - mark.skip - 1
        for frame in frames:
            reached += 1
            if reached == i:
                yield i, frame
                break
        else:
            raise NotExactError


def _from_the_start(path: StrPath, table: VideoIndex, container: Any, stream: Any, wanted: list[int]) -> Found:
    """The frames counted from the first on; what cannot be decoded ends them, except where the index has passed over it."""
    found, troubles, missing = 0, list[str](), set(wanted)

    def trouble(error: Exception) -> None:
        troubles.append(f": {reason_of(error)}")
        if table.counted is None:
            raise error

    try:
        for frame in decoded(packets_of(container, stream), stream, trouble):
            if found in missing:
                yield found, frame
                missing.remove(found)
                if not missing:
                    return
            found += 1
    except failures() as error:
        troubles.append(f": {reason_of(error)}")
    last = troubles[-1] if troubles else ""
    if found == 0:
        raise VideoError(path, f"no frame decodes{last}")
    if missing:
        raise VideoError(path, f"only the first {found} of {table.count} frames decode{last}", decodable=found)
