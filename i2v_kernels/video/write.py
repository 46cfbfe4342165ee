"""Write frames to a video file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import torch

from .errors import import_av


def write_video(
    path: str | Path,
    frames: torch.Tensor,
    fps: float,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    gop: int | None = None,
    bframes: int | None = None,
    options: Mapping[str, str] | None = None,
) -> None:
    """Encode ``frames`` into a video; the container follows from the suffix of ``path`` (``.mp4``, ``.mkv``, ...).

    The file is written beside its target and renamed, so that ``path`` is either absent, as before, or complete.
    The same frames give the same bytes, on machines with different numbers of cores too: one encoder thread, and libx264
    without its macroblock tree (``mbtree``, unless ``options`` sets it), which now and then decides otherwise.

    Args:
        path: the file to write; its folder must exist.
        frames: ``[T, H, W, 3]`` uint8 RGB, T >= 1, on any device. H and W even for 4:2:0 pixel formats.
        fps: frames per second.
        codec: an encoder of FFmpeg: ``libx264``, ``libx265``, ``libvpx-vp9``, ``libsvtav1``, ``mpeg4``, ``mjpeg``, ...
        pix_fmt: pixel format in the file.
        gop: most frames between two key frames (encoder's default if None).
        bframes: most consecutive B-frames (encoder's default if None).
        options: further options of the encoder, e.g. ``{"crf": "18", "preset": "veryfast"}``.

    Raises:
        ImportError: PyAV is not installed.
        TypeError, ValueError: an argument is not as above, or the encoder refuses it.
        OSError: the file cannot be written.
    """
    av = import_av()
    if not isinstance(frames, torch.Tensor) or frames.dtype != torch.uint8:
        raise TypeError(f"write_video: frames must be a uint8 tensor, got {getattr(frames, 'dtype', type(frames))}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"write_video: frames must be [T, H, W, 3] and not empty, got {list(frames.shape)}")
    _, height, width, _ = frames.shape
    if "420" in pix_fmt and (height % 2 or width % 2):
        raise ValueError(f"write_video: pix_fmt={pix_fmt!r} needs even height and width, got {height} x {width}")
    if not fps > 0:
        raise ValueError(f"write_video: fps must be positive, got {fps}")
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    encoder = dict(options or {})
    if codec == "libx264":
        encoder.setdefault("mbtree", "0")
    if gop is not None:
        encoder["g"] = str(gop)
    if bframes is not None:
        encoder["bf"] = str(bframes)
    try:
        with av.open(str(partial), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(100_000), options=encoder)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            stream.codec_context.thread_count = 1
            for image in frames.cpu().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (av.error.FFmpegError, ValueError) as error:
        how = f"codec={codec!r}, pix_fmt={pix_fmt!r}"
        raise ValueError(f"write_video: cannot write {path} with {how}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
