"""Files of every family that a data set may hold: container x codec x B-frames x key frames x start x joins x fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch

from .clips import coded_frames, encode

COUNT = 40
Change = Callable[[Path, Path], None]

X265 = {"preset": "ultrafast", "g": "12"}
QUICK = {"deadline": "realtime", "cpu-used": "8"}
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264 no b": ("libx264", {"g": "8", "bf": "0"}),
    "h264 b": ("libx264", {"g": "9", "bf": "2"}),
    "h264 pyramid": ("libx264", {"g": "250", "bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}),
    "h264 open": ("libx264", {"x264-params": "open-gop=1:keyint=10:min-keyint=1:bframes=3:scenecut=0"}),
    "h264 refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "h264 interlaced": ("libx264", {"g": "9", "bf": "2", "x264-params": "tff=1"}),
    "hevc no b": ("libx265", {**X265, "x265-params": "log-level=none:bframes=0:scenecut=0"}),
    "hevc closed": ("libx265", {**X265, "x265-params": "log-level=none:bframes=3:open-gop=0:keyint=12"}),
    "hevc open": ("libx265", {**X265, "x265-params": "log-level=none:bframes=3:open-gop=1:keyint=12"}),
    "vp8": ("libvpx", {**QUICK, "g": "12"}),
    "vp8 hidden": ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "5"}),
    "vp9": ("libvpx-vp9", {**QUICK, "g": "12"}),
    "vp9 hidden": ("libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "5"}),
    "av1": ("libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg1": ("mpeg1video", {"g": "9", "bf": "2"}),
    "mpeg2 no b": ("mpeg2video", {"g": "9", "bf": "0"}),
    "mpeg2": ("mpeg2video", {"g": "9", "bf": "2"}),
    "mpeg4 no b": ("mpeg4", {"g": "9", "bf": "0"}),
    "mpeg4": ("mpeg4", {"g": "9", "bf": "2"}),
    "mpeg4 one b": ("mpeg4", {"g": "9", "bf": "1"}),
    "msmpeg4": ("msmpeg4", {"g": "9"}),
    "wmv": ("wmv2", {"g": "9"}),
    "h263": ("h263p", {"g": "9"}),
    "flv1": ("flv", {"g": "9"}),
    "mjpeg": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "ffv1": ("ffv1", {"g": "1"}),
    "ffv1 gop": ("ffv1", {"g": "9"}),
    "huffyuv": ("ffvhuff", {}),
    "prores": ("prores_ks", {"pix_fmt": "yuv422p10le"}),
    "raw": ("rawvideo", {}),
}
CONTAINERS = {
    "mp4": "h264 no b,h264 b,h264 pyramid,h264 open,h264 refresh,h264 interlaced,hevc no b,hevc closed,hevc open,vp9,vp9 hidden,av1,"
    "mpeg4 no b,mpeg4,mpeg2,mjpeg",
    "mkv": "h264 no b,h264 b,h264 pyramid,h264 open,h264 refresh,h264 interlaced,hevc closed,hevc open,vp8 hidden,vp9 hidden,av1,"
    "mpeg1,mpeg2,mpeg4,msmpeg4,wmv,mjpeg,ffv1,ffv1 gop,huffyuv,prores,raw",
    "webm": "vp8,vp8 hidden,vp9,vp9 hidden,av1",
    "mov": "h264 b,mpeg4,mjpeg,prores,h263",
    "avi": "h264 no b,h264 b,h264 pyramid,vp8,vp8 hidden,mpeg1,mpeg2,mpeg4 no b,mpeg4,mpeg4 one b,msmpeg4,wmv,mjpeg,ffv1 gop,huffyuv,raw",
    "ts": "h264 no b,h264 b,h264 pyramid,h264 open,h264 refresh,h264 interlaced,hevc closed,hevc open,mpeg1,mpeg2 no b,mpeg2,mpeg4",
    "m2ts": "h264 b,mpeg2",
    "mpg": "mpeg1,mpeg2 no b,mpeg2",
    "vob": "mpeg2",
    "flv": "flv1,h264 no b,h264 b",
    "wmv": "msmpeg4,wmv,mpeg4,h264 b",
    "ogg": "vp8",
    "ivf": "vp8 hidden,vp9 hidden,av1",
    "nut": "h264 b,mpeg4",
    "h264": "h264 b,h264 open",
    "hevc": "hevc open",
    "m4v": "mpeg4",
    "m2v": "mpeg2",
    "m1v": "mpeg1",
    "mxf": "mpeg2",
    "3gp": "h264 b",
}


def remux(source: Path, target: Path, *, first: int = 0, invented: bool = False, flags: dict[str, str] | None = None) -> Path:
    """A copy of the packets from ``first`` on; ``invented``: they are shown when they are decoded, says the copy."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=flags or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            if number < first:
                continue
            packet.stream = stream
            if invented:
                packet.pts = packet.dts
            new.mux(packet)
    return target


def packed(source: Path, target: Path) -> Path:
    """DivX's and XviD's way to have B-frames in AVI: in the packet of the frame behind it, and then a packet of nothing."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        stream.codec_context.codec_tag = "XVID"
        packets = [bytes(packet) for packet in old.demux(video=0) if packet.size]
        name = b"\0\0\1\xb2DivX503b1393p"
        head = packets[0].index(b"\0\0\1\xb6")
        packets[0] = packets[0][:head] + name + packets[0][head:]
        empty = b"\0\0\1\xb6" + bytes([0x50, 0, 0x1F])
        out: list[bytes] = []
        for data in packets:
            kind = data[data.index(b"\0\0\1\xb6") + 4] >> 6
            if kind == 2:
                out[-1] += data
                out.append(empty)
            else:
                out.append(data)
        for i, data in enumerate(out):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, stream.time_base
            new.mux(packet)
    return target


def truth(path: Path, stream: int = 0) -> list[torch.Tensor]:
    """Every frame that the decoder gives from the start, as the ffmpeg program does."""
    images = []
    with av.open(str(path)) as file:
        video = file.streams.video[stream]
        video.codec_context.thread_count = 1
        for packet in [*(packet for packet in file.demux(video) if packet.size), None]:
            try:
                images += [frame.to_ndarray(format="rgb24") for frame in video.codec_context.decode(packet)]
            except av.FFmpegError:
                continue
    return [torch.from_numpy(image) for image in images]
