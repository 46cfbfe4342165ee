"""Files of every family that a data set may hold: container x codec x B-frames x key frames x start x joins x fields."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import av
import torch

from bench.packed import pack

from .clips import coded_frames, encode
from .field_writer import write_fields

COUNT = 40
Make = Callable[[Path], Path]  # writes the file, a name without its suffix

_REALTIME = {"deadline": "realtime", "cpu-used": "8", "g": "12"}
_HIDDEN = {"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "5", "g": "12"}  # frames to predict from, never shown
_X265 = "log-level=none:keyint=12:scenecut=0"
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264 no b": ("libx264", {"g": "8", "bf": "0"}),
    "h264 b": ("libx264", {"g": "9", "bf": "2"}),
    "h264 pyramid": ("libx264", {"g": "250", "bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}),
    "h264 open": ("libx264", {"x264-params": "open-gop=1:keyint=10:min-keyint=1:bframes=3:scenecut=0"}),
    "h264 refresh": ("libx264", {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}),
    "h264 interlaced": ("libx264", {"g": "9", "bf": "2", "x264-params": "tff=1"}),
    "hevc no b": ("libx265", {"preset": "ultrafast", "x265-params": f"{_X265}:bframes=0"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": f"{_X265}:bframes=3:open-gop=0"}),
    "hevc open": ("libx265", {"preset": "ultrafast", "x265-params": f"{_X265}:bframes=3:open-gop=1"}),
    "vp8": ("libvpx", _REALTIME),
    "vp8 hidden": ("libvpx", _HIDDEN),
    "vp9": ("libvpx-vp9", _REALTIME),
    "vp9 hidden": ("libvpx-vp9", _HIDDEN),
    "av1": ("libsvtav1", {"g": "12", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg1": ("mpeg1video", {"g": "9", "bf": "2"}),
    "mpeg2 no b": ("mpeg2video", {"g": "9", "bf": "0"}),
    "mpeg2": ("mpeg2video", {"g": "9", "bf": "2"}),
    "mpeg4 no b": ("mpeg4", {"g": "9", "bf": "0"}),
    "mpeg4": ("mpeg4", {"g": "9", "bf": "2"}),
    "mpeg4 one b": ("mpeg4", {"g": "12", "bf": "1"}),
    "msmpeg4": ("msmpeg4", {"g": "9"}),
    "wmv2": ("wmv2", {"g": "9"}),
    "flv1": ("flv", {"g": "9"}),
    "mjpeg": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "ffv1": ("ffv1", {"g": "9"}),
    "huffyuv": ("ffvhuff", {}),
    "prores": ("prores_ks", {"pix_fmt": "yuv422p10le"}),
    "raw": ("rawvideo", {}),
}
CONTAINERS = {
    "mp4": "h264 no b,h264 b,h264 pyramid,h264 open,h264 refresh,h264 interlaced,hevc no b,hevc,hevc open,vp9 hidden,av1,"
    "mpeg4,mpeg2,mjpeg",
    "mkv": "h264 b,h264 pyramid,h264 open,h264 refresh,hevc open,vp8 hidden,vp9,av1,mpeg1,mpeg2,mpeg4,msmpeg4,mjpeg,ffv1,"
    "prores",
    "webm": "vp8,vp8 hidden,vp9,vp9 hidden,av1",
    "mov": "h264 b,mpeg4,prores",
    "avi": "h264 no b,h264 b,h264 pyramid,vp8,vp8 hidden,mpeg1,mpeg2,mpeg4 no b,mpeg4,msmpeg4,wmv2,mjpeg,ffv1,huffyuv,raw",
    "ts": "h264 no b,h264 b,h264 pyramid,h264 open,h264 refresh,h264 interlaced,hevc,hevc open,mpeg1,mpeg2,mpeg4",
    "mpg": "mpeg1,mpeg2 no b,mpeg2",
    "flv": "flv1,h264 no b,h264 b",
    "wmv": "msmpeg4,wmv2,mpeg4,h264 b",
    "ogg": "vp8",
    "ivf": "vp8 hidden,vp9 hidden,av1",
    "nut": "h264 b",
    "h264": "h264 b,h264 open",
    "hevc": "hevc open",
    "m2v": "mpeg2",
    "mxf": "mpeg2",
}


def coded(codec: str, suffix: str, target: Path, count: int = COUNT) -> Path:
    name, options = CODECS[codec]
    return encode(target.with_suffix(f".{suffix}"), coded_frames(count), name, **options)


def remuxed(source: Make, suffix: str, target: Path, *, first: int | None = 0, invented: bool = False) -> Path:
    """The packets from ``first`` on (None: the third key frame); ``invented``: as if they were shown when they are decoded."""
    path = target.with_suffix(f".{suffix}")
    with av.open(str(source(target.with_name("source")))) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        if first is None:
            first = [i for i, packet in enumerate(packets) if packet.is_keyframe][2]
        for packet in packets[first:]:
            packet.stream = stream
            packet.pts = packet.dts if invented else packet.pts
            new.mux(packet)
    return path


def packed(target: Path) -> Path:
    return pack(coded("mpeg4 one b", "avi", target.with_name("unpacked")), target.with_suffix(".avi"))


def joined(first: Make, second: Make, target: Path) -> Path:
    """One file behind the other, as they are: the clock goes back."""
    one, other = first(target.with_name("one")), second(target.with_name("other"))
    path = target.with_suffix(one.suffix)
    path.write_bytes(one.read_bytes() + other.read_bytes())
    return path


def cut(source: Make, target: Path, packets: int = 3) -> Path:
    """A transport stream that lost its end."""
    path = source(target)
    path.write_bytes(path.read_bytes()[: -188 * packets])
    return path


FAMILIES: dict[str, Make] = {
    f"{codec}, {container}": partial(coded, codec, container)
    for container, codecs in CONTAINERS.items()
    for codec in codecs.split(",")
}
FAMILIES |= {"packed, avi": packed, "fields, mkv": write_fields}
FAMILIES |= {f"packed, avi copied to {suffix}": partial(remuxed, packed, suffix) for suffix in ("mp4", "mkv", "mov")}
for _codec, _from, _to in (
    ("h264 b", "avi", "mp4"), ("h264 b", "avi", "mkv"), ("h264 pyramid", "avi", "mov"), ("h264 b", "ts", "mp4"),
    ("hevc open", "ts", "mkv"), ("mpeg4", "avi", "mp4"), ("mpeg2", "ts", "mkv"),
):  # fmt: skip
    FAMILIES[f"{_codec}, {_from} copied to {_to}"] = partial(remuxed, partial(coded, _codec, _from), _to)
    FAMILIES[f"{_codec}, {_from} copied to {_to} with its order of decoding"] = partial(
        remuxed, partial(coded, _codec, _from), _to, invented=True
    )
for _codec, _suffix in (
    ("h264 b", "mp4"), ("h264 open", "mkv"), ("hevc open", "mp4"), ("h264 b", "ts"), ("hevc open", "ts"), ("mpeg2", "ts"),
    ("mpeg4", "avi"), ("mpeg2", "mpg"), ("vp8", "webm"), ("vp9", "webm"), ("h264 b", "flv"), ("h264 refresh", "mp4"),
    ("h264 b", "avi"), ("msmpeg4", "wmv"),
):  # fmt: skip
    FAMILIES[f"{_codec}, {_suffix} from its sixth packet"] = partial(remuxed, partial(coded, _codec, _suffix), _suffix, first=5)
for _codec, _suffix in (
    ("h264 open", "mkv"), ("h264 open", "mp4"), ("hevc open", "mkv"), ("hevc open", "mp4"), ("hevc", "mkv"),
):  # fmt: skip
    _name = f"{_codec}, {_suffix} from its third key frame"
    FAMILIES[_name] = partial(remuxed, partial(coded, _codec, _suffix), _suffix, first=None)
for _codec, _suffix in (
    ("h264 b", "ts"), ("h264 open", "ts"), ("hevc open", "ts"), ("mpeg2", "ts"), ("mpeg4", "ts"), ("mpeg2", "mpg"),
    ("h264 b", "h264"), ("vp8", "ogg"), ("h264 b", "mkv"), ("vp9", "webm"),
):  # fmt: skip
    _whole = partial(coded, _codec, _suffix)
    FAMILIES[f"{_codec}, {_suffix} joined"] = partial(joined, _whole, _whole)
    _rest = partial(remuxed, _whole, _suffix, first=5)
    FAMILIES[f"{_codec}, {_suffix} joined with its sixth packet"] = partial(joined, _whole, _rest)
for _codec in ("h264 b", "mpeg2"):
    _whole = partial(coded, _codec, "ts")
    FAMILIES[f"{_codec}, ts joined where it breaks off"] = partial(joined, partial(cut, _whole), _whole)


def truth(path: Path, stream: int = 0) -> list[torch.Tensor]:
    """Every frame that the decoder gives from the start, whatever it cannot decode on the way."""
    images = []
    with av.open(str(path)) as file:
        video = file.streams.video[stream]
        video.codec_context.thread_count = 1
        for packet in [*(packet for packet in file.demux(video) if packet.size), None]:
            with suppress(av.FFmpegError, ValueError):
                images += [frame.to_ndarray(format="rgb24") for frame in video.codec_context.decode(packet)]
    return [torch.from_numpy(image) for image in images]
