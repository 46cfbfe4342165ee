"""A clip in the form of UCF-101's and HMDB-51's: MPEG-4 in AVI with packed B-frames, one key frame in ten seconds."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

_START = b"\0\0\1\xb6"
_EMPTY = _START + b"\x50\0\x1f"  # a picture that is not coded


def write_unpacked(path: Path, frames: np.ndarray, key_frames: int = 250, **options: str) -> Path:
    """MPEG-4 with a B-frame between every two others; ``frames``: ``[T, H, W, 3]`` uint8."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25, options={"g": str(key_frames), "bf": "1", **options})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for image in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return path


def pack(source: Path, target: Path) -> Path:
    """As DivX and XviD write it: each B-frame in the packet of a frame it is predicted from, an empty picture behind."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [(bytes(packet), packet.is_keyframe) for packet in old.demux(video=0) if packet.size]
        head = packets[0][0].index(_START)
        packets[0] = packets[0][0][:head] + b"\0\0\1\xb2DivX503b1393p" + packets[0][0][head:], True
        out: list[tuple[bytes, bool]] = []
        for data, key in packets:
            if data[data.index(_START) + 4] >> 6 == 2:  # B
                out[-1] = out[-1][0] + data, out[-1][1]
                out.append((_EMPTY, False))
            else:
                out.append((data, key))
        for i, (data, key) in enumerate(out):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, stream.time_base
            packet.is_keyframe = key
            new.mux(packet)
    return target
