"""What a packet of H.264 or H.265 holds; see `bitstream`. Sources: ITU-T H.264 and H.265, sections 7.3, 8.2.1 and 8.3.1."""

from __future__ import annotations

from collections.abc import Iterator

from .bits import Bits, UnreadableError
from .bitstream import Picture, Pictures, UnprovableError

UNDECODABLE = "it begins with pictures that cannot be decoded"
_HEAD = 96  # bytes of a slice that hold all that is read of its header


class NalPictures(Pictures):
    """What H.264 and H.265 have in common: units with a length before them, parameter sets that must not change."""

    header_bytes = 1

    def __init__(self, extradata: bytes) -> None:
        super().__init__(extradata)
        self.sets: dict[tuple[int, int], bytes] = {}  # (kind, number) -> a parameter set as it stands in the file
        self.length_size = 0
        self.epoch = self.previous = 0
        if not extradata or extradata[0] != 1:
            raise UnprovableError("its packets are not in the form of MP4 files")
        try:
            for unit in self.in_extradata(extradata):
                self.parameters(unit)
        except (UnreadableError, IndexError) as error:
            raise UnprovableError("its parameter sets cannot be understood") from error

    def in_extradata(self, data: bytes) -> Iterator[bytes]:
        raise NotImplementedError

    def parameters(self, unit: bytes) -> None:
        """Keeps a parameter set and reads what is needed of it."""
        raise NotImplementedError

    def keep(self, kind: int, number: int, unit: bytes) -> bool:
        """Whether it is new; another under the same number is more than can be followed here."""
        unit = unit.rstrip(b"\0")
        known = self.sets.setdefault((kind, number), unit)
        if known != unit:
            raise UnprovableError(f"its parameters change at packet {self.count}")
        return known is unit

    def units(self, data: memoryview) -> Iterator[memoryview]:
        at, size = 0, self.length_size
        while at < len(data):
            length = int.from_bytes(data[at : at + size], "big")
            at += size
            if length == 0 or at + length > len(data):
                raise UnreadableError
            yield data[at : at + length]
            at += length

    def bits(self, unit: memoryview | bytes, length: int = _HEAD) -> Bits:
        """Of the unit's body, without the bytes that only keep start codes away."""
        return Bits(bytes(unit[self.header_bytes : length]).replace(b"\0\0\3", b"\0\0"))

    def place(self, low: int, bits: int, reference: bool) -> tuple[int, int]:
        """The picture's place in the order of display from the low bits of its count (H.264 8.2.1.1, H.265 8.3.1)."""
        size = 1 << bits
        high = self.previous & -size
        apart = low - (self.previous & size - 1)
        high += size * ((apart <= -size // 2) - (apart > size // 2))
        if reference:
            self.previous = high + low
        return self.epoch, high + low


class H264Pictures(NalPictures):
    def in_extradata(self, data: bytes) -> Iterator[bytes]:
        self.length_size, at = (data[4] & 3) + 1, 5
        for mask in (31, 255):
            found, at = _listed(data, at + 1, data[at] & mask)
            yield from found

    def parameters(self, unit: bytes) -> None:
        bits = self.bits(unit, len(unit))
        kind = unit[0] & 31
        if kind == 7:
            profile, _, _ = bits.read(8), bits.read(8), bits.read(8)
            if self.keep(7, bits.golomb(), unit):
                self._sequence(bits, profile)
        elif kind == 8:
            number, sequence = bits.golomb(), bits.golomb()
            if self.keep(8, number, unit) and (7, sequence) not in self.sets:
                raise UnreadableError
        if sum(kind == 7 for kind, _ in self.sets) > 1:
            raise UnprovableError("it has more than one sequence parameter set")

    def _sequence(self, bits: Bits, profile: int) -> None:
        self.planes = False
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            chroma = bits.golomb()
            self.planes = bool(bits.read(1)) if chroma == 3 else False
            bits.golomb(), bits.golomb(), bits.read(1)
            if bits.read(1):
                for i in range(8 if chroma != 3 else 12):
                    if bits.read(1):
                        bits.scaling_list(16 if i < 6 else 64)
        self.frame_bits = bits.golomb() + 4
        self.order_type = bits.golomb()
        if self.order_type == 0:
            self.order_bits = bits.golomb() + 4
        elif self.order_type == 1:
            raise UnprovableError("H.264 pictures ordered by a cycle")
        bits.golomb(), bits.read(1), bits.golomb(), bits.golomb()  # references, gaps, width, height
        self.frames_only = bits.read(1)
        if not self.frames_only:
            bits.read(1)
        bits.read(1)
        if bits.read(1):  # cropping
            for _ in range(4):
                bits.golomb()
        self.reorder_depth = bits.read(1) and bits.h264_reordering()

    def picture(self, data: memoryview) -> Picture:
        found: list[Picture] = []
        recovery = False
        for unit in self.units(data):
            kind = unit[0] & 31
            if kind in (7, 8):
                self.parameters(bytes(unit))
            elif kind == 6:
                recovery = recovery or self._recovery(unit)
            elif kind in (2, 3, 4):
                raise UnprovableError("H.264 slices in partitions")
            elif kind in (1, 5):
                bits = self.bits(unit)
                if bits.golomb() == 0:  # the first slice of a picture
                    found.append(self._slice(bits, kind == 5, unit[0] >> 5 & 3, recovery))
        if len(found) != 1:
            raise UnprovableError(f"packet {self.count} holds {len(found)} pictures")
        return found[0]

    def _slice(self, bits: Bits, idr: bool, reference: int, recovery: bool) -> Picture:
        bits.golomb()  # its type
        if (8, bits.golomb()) not in self.sets:
            raise UnreadableError
        if self.planes:
            bits.read(2)
        bits.read(self.frame_bits)
        if not self.frames_only and bits.read(1):
            raise UnprovableError("it is coded in fields, two packets to a frame")
        if idr:
            bits.golomb()
            self.epoch, self.previous = self.epoch + 1, 0
        if self.order_type == 2:
            return Picture(1, (self.epoch, self.count), idr or recovery)
        order = self.place(bits.read(self.order_bits), self.order_bits, bool(reference))
        if self.count == 0:
            self.first = order
        elif order < self.first:
            raise UnprovableError(UNDECODABLE)
        return Picture(1, order, idr or recovery)

    def _recovery(self, unit: memoryview) -> bool:
        """Whether a supplemental unit says that all pictures shown from here on decode exactly (annex D.1.8)."""
        data, at = bytes(unit[1:]).replace(b"\0\0\3", b"\0\0"), 0
        while at + 2 < len(data):
            kind = length = 0
            while data[at] == 255:
                kind, at = kind + 255, at + 1
            kind, at = kind + data[at], at + 1
            while data[at] == 255:
                length, at = length + 255, at + 1
            length, at = length + data[at], at + 1
            if kind == 6:
                bits = Bits(data[at : at + length])
                return bits.golomb() == 0 and bool(bits.read(1))
            at += length
        return False


class HevcPictures(NalPictures):
    header_bytes = 2

    def __init__(self, extradata: bytes) -> None:
        self.leading = False  # after a first picture that others lead, which cannot be decoded
        self.order_bits = self.extra_bits = 0
        self.planes = False
        super().__init__(extradata)

    def in_extradata(self, data: bytes) -> Iterator[bytes]:
        self.length_size, at = (data[21] & 3) + 1, 23
        for _ in range(data[22]):
            number, at = int.from_bytes(data[at + 1 : at + 3], "big"), at + 3
            found, at = _listed(data, at, number)
            yield from found

    def parameters(self, unit: bytes) -> None:
        bits = self.bits(unit, len(unit))
        kind, layer = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3
        if layer:
            return
        if kind == 33:
            bits.read(4)
            deeper = bits.read(3)
            bits.read(1)
            bits.hevc_profile(deeper)
            if self.keep(33, bits.golomb(), unit):
                self._sequence(bits, deeper)
        elif kind == 34 and self.keep(34, bits.golomb(), unit):
            bits.golomb(), bits.read(1)
            if bits.read(1):
                raise UnprovableError("H.265 pictures that may not be output")
            self.extra_bits = bits.read(3)
        if sum(kind == 33 for kind, _ in self.sets) > 1:
            raise UnprovableError("it has more than one sequence parameter set")

    def _sequence(self, bits: Bits, deeper: int) -> None:
        if bits.golomb() == 3:
            self.planes = bool(bits.read(1))
        bits.golomb(), bits.golomb()
        if bits.read(1):
            for _ in range(4):
                bits.golomb()
        bits.golomb(), bits.golomb()
        self.order_bits = bits.golomb() + 4
        for _ in range(1 if not bits.read(1) else deeper + 1):
            bits.golomb()
            self.reorder_depth = bits.golomb()
            bits.golomb()

    def picture(self, data: memoryview) -> Picture:
        found: list[Picture] = []
        for unit in self.units(data):
            kind, layer, temporal = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3, (unit[1] & 7) - 1
            if layer:
                continue
            if kind in (33, 34):
                self.parameters(bytes(unit))
            elif kind in (36, 37):
                raise UnprovableError(f"its sequence ends at packet {self.count} and another begins")
            elif kind < 32:
                bits = self.bits(unit)
                if bits.read(1):  # the first slice of a picture
                    found.append(self._slice(bits, kind, temporal))
        if len(found) != 1:
            raise UnprovableError(f"packet {self.count} holds {len(found)} pictures")
        return found[0]

    def _slice(self, bits: Bits, kind: int, temporal: int) -> Picture:
        start = 16 <= kind <= 23
        if start:
            if bits.read(1) and self.count:
                raise UnprovableError(f"pictures before packet {self.count} are not to be output")
            self.leading = self.count == 0 or 16 <= kind <= 18
        elif kind in (8, 9) and self.leading:
            raise UnprovableError(UNDECODABLE)
        if (34, bits.golomb()) not in self.sets:
            raise UnreadableError
        bits.read(self.extra_bits)
        bits.golomb()  # its type
        if self.planes:
            bits.read(2)
        if kind in (19, 20):
            self.epoch, self.previous = self.epoch + 1, 0
            return Picture(1, (self.epoch, 0), True)
        if 16 <= kind <= 18:  # counting begins anew
            self.epoch, self.previous = self.epoch + 1, 0
        counts = temporal == 0 and not 6 <= kind <= 9 and not (kind < 16 and kind % 2 == 0)
        return Picture(1, self.place(bits.read(self.order_bits), self.order_bits, counts), start)


def _listed(data: bytes, at: int, number: int) -> tuple[list[bytes], int]:
    """So many units, each behind its length in two bytes, and where they end."""
    found = []
    for _ in range(number):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        found.append(data[at + 2 : end])
        at = end
    return found, at
