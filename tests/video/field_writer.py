"""A writer of H.264 whose frames are coded as two fields each, in packets of their own; no encoder at hand does that."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .clips import coded_frames

SIDE = 64


def write_fields(target: Path, count: int = 30) -> Path:
    """``count`` frames of 64 x 64 in Matroska, uncompressed (I_PCM), the upper field first."""
    start, sets = b"\0\0\0\1", _sequence() + b"\0\0\0\1" + _picture()
    fields = [
        _field(np.clip(image[bottom::2, :, 0], 1, 255), number, bottom)
        for number, image in enumerate(coded_frames(count, SIDE, SIDE))
        for bottom in (0, 1)
    ]
    stored, path = target.with_suffix(".h264"), target.with_suffix(".mkv")
    stored.write_bytes(b"".join([start + sets, *(start + field for field in fields)]))
    with av.open(str(stored)) as plain, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(plain.streams.video[0])
        for i, field in enumerate(fields):
            packet = av.Packet((start + sets if i == 0 else b"") + start + field)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 1000), i == 0
            packet.pts = packet.dts = 20 * i
            file.mux(packet)
    return path


def _field(grey: np.ndarray, number: int, bottom: int) -> bytes:
    first = number == 0 and not bottom
    bits = _golomb(0) + _golomb(7) + _golomb(0) + f"{number % 256:08b}" + "1" + str(bottom)
    bits += _golomb(0) if first else ""  # idr_pic_id
    bits += f"{(2 * number + bottom) % 256:08b}" + ("00" if first else "0") + _golomb(0)  # order, marking, quantiser
    out = bytearray()
    for top in range(0, SIDE // 2, 16):
        for left in range(0, SIDE, 16):
            bits += _golomb(25)
            bits += "0" * (-len(bits) % 8)
            out += _bytes(bits) + grey[top : top + 16, left : left + 16].tobytes() + bytes([128]) * 128
            bits = ""
    return _unit(0x65 if first else 0x21, bytes(out) + b"\x80")


def _sequence() -> bytes:
    bits = _golomb(0) + _golomb(4) + _golomb(0) + _golomb(4) + _golomb(1) + "0" + _golomb(SIDE // 16 - 1)
    return _unit(0x67, bytes([77, 0, 30]) + _closed(bits + _golomb(SIDE // 32 - 1) + "0" + "0" + "1" + "0" + "0"))


def _picture() -> bytes:
    zero = _golomb(0)
    return _unit(0x68, _closed(zero * 2 + "00" + zero * 3 + "000" + zero * 3 + "000"))


def _unit(kind: int, body: bytes) -> bytes:
    """With a byte wherever three would look like a start code."""
    out, zeros = bytearray([kind]), 0
    for byte in body:
        if zeros == 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


def _golomb(value: int) -> str:
    code = f"{value + 1:b}"
    return "0" * (len(code) - 1) + code


def _closed(bits: str) -> bytes:
    bits += "1"
    return _bytes(bits + "0" * (-len(bits) % 8))


def _bytes(bits: str) -> bytes:
    return int(bits, 2).to_bytes(len(bits) // 8, "big")
