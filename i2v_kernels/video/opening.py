"""Opening a file, choosing its video stream, and feeding its packets to the decoder: the same way each time."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any
from zlib import crc32

from .errors import VideoError, import_av, shown
from .types import Mark, StrPath

# Files come from anywhere: a playlist must not reach other hosts, bad metadata is no reason.
_OPEN = {"container_options": {"protocol_whitelist": "file"}, "metadata_errors": "ignore"}
_STILL_CODECS = {"png", "bmp", "tiff"}
_FAR = 4096  # packets from where a seek leads to that of the mark, at most


class NotExactError(Exception):
    """Seeking did not lead to the wanted frame."""


def failures() -> tuple[type[Exception], ...]:
    """What PyAV raises at damaged files; fuzzing it found more than FFmpeg's errors."""
    return import_av().error.FFmpegError, OSError, ValueError, LookupError, ArithmeticError, MemoryError, RuntimeError


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextmanager
def opened(path: StrPath, number: int | None = None) -> Iterator[tuple[Any, Any]]:
    """The open container and its video stream (``number``, if it is known); what is wrong with it leaves as a VideoError."""
    av = import_av()
    if (reason := _not_a_file(path)) is not None:
        raise VideoError(path, reason)
    try:
        with av.open(os.path.abspath(os.fspath(path)), **_OPEN) as container:
            stream = choose(container.streams.video) if number is None else container.streams[number]
            if stream is None:
                raise VideoError(path, "has no video stream")
            if stream.codec_context is None:
                raise VideoError(path, "no decoder for its codec")
            # Threads pay off across files, in worker processes; inside one they oversubscribe the machine.
            stream.codec_context.thread_count = 1
            yield container, stream
    except failures() as error:
        raise VideoError(path, f"cannot be read: {reason_of(error)}") from error


def choose(streams: Any) -> Any:
    """The stream that is shown: the one marked default, else the first with motion; never the cover picture of a song."""
    kinds = import_av().stream.Disposition
    streams = [stream for stream in streams if not stream.disposition & kinds.attached_pic]
    still = kinds.still_image | kinds.timed_thumbnails
    marked = [stream for stream in streams if stream.disposition & kinds.default]

    def moves(stream: Any) -> bool:
        codec = stream.codec_context.codec.canonical_name if stream.codec_context is not None else ""
        return not stream.disposition & still and stream.frames != 1 and codec not in _STILL_CODECS

    for some in (marked, streams):
        if found := next((stream for stream in some if moves(stream)), None):
            return found
    return next(iter(marked or streams), None)


def packets_of(container: Any, stream: Any) -> Iterator[Any]:
    """The packets to decode, in file order.

    An empty one means "the frame before once more", and would drain the decoder. Half a packet, where a file breaks off, is no
    frame; MPEG transport streams alone mark whole packets so, beside a gap.
    """
    halves = container.format.name != "mpegts"
    for packet in container.demux(stream):
        if packet.size and not (halves and packet.is_corrupt):
            yield packet


def packets_from(container: Any, stream: Any, mark: Mark) -> Iterator[Any]:
    """The packets from that of a mark on, which is known by its bytes; a NotExactError if seeking does not lead to it."""
    container.seek(mark.time, stream=stream)
    packets = packets_of(container, stream)
    for packet in islice(packets, _FAR):
        if packet.is_keyframe and crc32(memoryview(packet)) == mark.crc:
            return chain([packet], packets)
    raise NotExactError


def decoded(packets: Iterable[Any], stream: Any, trouble: Callable[[Exception], None] = lambda error: None) -> Iterator[Any]:
    """All frames of the packets, as the decoder gives them; it goes on behind what it cannot decode, and tells ``trouble``."""
    for packet in packets:
        yield from _given(packet.decode, trouble)
    yield from _given(partial(stream.codec_context.decode, None), trouble)


def _given(decode: Callable[[], list[Any]], trouble: Callable[[Exception], None]) -> list[Any]:
    try:
        return decode()
    except failures() as error:
        trouble(error)
        return []


def _not_a_file(path: StrPath) -> str | None:
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path) and isinstance(error, FileNotFoundError):
            return f"dangling link to {shown(os.readlink(path))}"
        return (error.strerror or str(error)).lower()
    except ValueError as error:  # a null byte, or what no file can be called
        return str(error)
    if stat.S_ISDIR(status.st_mode):
        return "is a directory"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    return None if status.st_size else "empty file"
