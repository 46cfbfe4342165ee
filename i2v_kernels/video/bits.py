"""A reader of bits, and of the two tables of H.264 and H.265 that one has to read to pass over them."""

from __future__ import annotations


class UnreadableError(Exception):
    """There are no such bits."""


class Bits:
    """The bits of ``data``, from the most significant one of the first byte on."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        """The next ``count`` bits as a number."""
        self._left -= count
        if self._left < 0:
            raise UnreadableError
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """An unsigned Exp-Golomb code, H.264 9.1."""
        zeros = self._left - (self._value & (1 << self._left) - 1).bit_length()
        if zeros > 32:
            raise UnreadableError
        return self.read(2 * zeros + 1) - 1

    def signed(self) -> int:
        """A signed Exp-Golomb code, H.264 9.1.1."""
        code = self.golomb()
        return (code + 1) // 2 if code % 2 else -(code // 2)

    def scaling_list(self, count: int) -> None:
        """Passes over one, H.264 7.3.2.1.1.1."""
        last = following = 8
        for _ in range(count):
            if following:
                following = (last + self.signed()) % 256
            last = following or last

    def h264_reordering(self) -> int:
        """``max_num_reorder_frames`` of the usability information, H.264 E.1.1; 0 where it does not say."""
        if self.read(1) and self.read(8) == 255:  # shape of pixels
            self.read(32)
        if self.read(1):  # overscan
            self.read(1)
        if self.read(1):  # video signal
            self.read(4)
            if self.read(1):
                self.read(24)
        if self.read(1):  # place of chroma
            self.golomb(), self.golomb()
        if self.read(1):  # timing
            self.read(65)
        buffers = 0
        for _ in range(2):
            if self.read(1):
                buffers += 1
                number = self.golomb() + 1
                self.read(8)
                for _ in range(number):
                    self.golomb(), self.golomb(), self.read(1)
                self.read(20)
        if buffers:
            self.read(1)
        self.read(1)
        if not self.read(1):  # no restrictions are told
            return 0
        self.read(1)
        for _ in range(4):
            self.golomb()
        return self.golomb()

    def hevc_profile(self, deeper: int) -> None:
        """Passes over profile, tier and level of a sequence with ``deeper`` temporal layers beyond the first, H.265 7.3.3."""
        self.read(88), self.read(8)
        present = [(self.read(1), self.read(1)) for _ in range(deeper)]
        if deeper:
            self.read(2 * (8 - deeper))
        for profile, level in present:
            self.read(88 * profile + 8 * level)
