"""What a packet holds, read from the first bytes of its pictures: how many are shown, in what order, where decoding can begin.

A frame may be looked for by its time only where these prove that each packet is one picture, that the times of the packets
put them in the order in which the decoder gives them, and that a key frame is one. Containers and their flags say all this too,
and are wrong too often: AVI has no times of display at all, and files made from AVI by copying inherit invented ones.

Sources: RFC 6386 section 9.1 (VP8); the VP9 specification, 6.2 and annex B; the AV1 specification, 5.3 to 5.9; H.264 and H.265
are in `nal`.
"""

from __future__ import annotations

from typing import NamedTuple

from .bits import Bits, UnreadableError


class Picture(NamedTuple):
    """A packet: the number of pictures shown, their place in the order of display, whether decoding can begin here.

    ``order`` compares within a stream; None where pictures are shown in the order of their packets.
    """

    shown: int
    order: tuple[int, int] | None = None
    start: bool = False


class UnprovableError(Exception):
    """Why nothing can be said."""


class Pictures:
    """Reads the packets of a stream in order: ``read(data)`` is a `Picture`, or raises an `UnprovableError`."""

    reorder_depth = 0  # pictures that the decoder is told to hold back

    def __init__(self, extradata: bytes) -> None:
        self.count = 0

    def read(self, data: memoryview) -> Picture:
        try:
            return self.picture(data)
        except (UnreadableError, IndexError) as error:
            raise UnprovableError(f"packet {self.count} cannot be understood") from error
        finally:
            self.count += 1

    def picture(self, data: memoryview) -> Picture:
        raise NotImplementedError


class IntraPictures(Pictures):
    """Codecs all of whose packets are a picture of their own."""

    def picture(self, data: memoryview) -> Picture:
        return Picture(1, None, True)


class JpegPictures(Pictures):
    """A picture stands alone if it brings its tables along, or if none ever does, as is usual in AVI."""

    tables = False  # have been told by a packet

    def picture(self, data: memoryview) -> Picture:
        found, at = set(), 2
        if bytes(data[:2]) != b"\xff\xd8":
            raise UnreadableError
        while data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the picture itself
            found.add(data[at + 1])
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 1] != 0xFF else 1
        alone = 0xDB in found and bool(found & {0xC0, 0xC1, 0xC2}) and (0xC4 in found or not self.tables)
        self.tables = self.tables or 0xC4 in found
        return Picture(1, None, alone)


class Vp8Pictures(Pictures):
    def picture(self, data: memoryview) -> Picture:
        shown = data[0] >> 4 & 1
        return Picture(shown, None, bool(shown and not data[0] & 1))


class Vp9Pictures(Pictures):
    def picture(self, data: memoryview) -> Picture:
        frames = [self._frame(part) for part in self._parts(data)]
        return Picture(sum(shown for shown, _ in frames), None, frames[0] == (1, True))

    @staticmethod
    def _parts(data: memoryview) -> list[memoryview]:
        last = data[-1]
        if last & 0xE0 == 0xC0:
            size, count = (last >> 3 & 3) + 1, (last & 7) + 1
            index = 2 + size * count
            if len(data) >= index and data[-index] == last:
                parts, at = [], 0
                for i in range(count):
                    place = len(data) - index + 1 + i * size
                    length = int.from_bytes(data[place : place + size], "little")
                    if length:
                        parts.append(data[at : at + length])
                    at += length
                return parts
        return [data]

    @staticmethod
    def _frame(data: memoryview) -> tuple[int, bool]:
        """(shown, key)."""
        bits = Bits(bytes(data[:2]))
        if bits.read(2) != 2:
            raise UnreadableError
        if bits.read(1) | bits.read(1) << 1 == 3:
            bits.read(1)
        if bits.read(1):  # show_existing_frame
            return 1, False
        key = not bits.read(1)
        return bits.read(1), key


class Av1Pictures(Pictures):
    def picture(self, data: memoryview) -> Picture:
        shown, start, at, first = 0, False, 0, True
        while at < len(data):
            header = data[at]
            kind, extended, sized = header >> 3 & 15, header & 4, header & 2
            at += 2 if extended else 1
            length = len(data) - at
            if sized:
                length, at = _leb128(data, at)
            if kind == 1 and data[at] & 0x18:  # still_picture, reduced_still_picture_header
                raise UnprovableError("AV1 still pictures")
            if kind in (3, 6):  # a frame's header, or a frame
                existing, frame_type, show = data[at] >> 7, data[at] >> 5 & 3, data[at] >> 4 & 1
                shown += existing | show
                if first:
                    start = not existing and frame_type == 0 and bool(show)
                first = False
            at += length
        return Picture(shown, None, start)


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        value |= (data[at + i] & 127) << 7 * i
        if not data[at + i] & 128:
            return value, at + i + 1
    raise UnreadableError
