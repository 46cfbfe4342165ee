"""The backend ``torchcodec``: PyTorch's decoder, held to the same frames as PyAV.

It is given the planner's index, so it need not read the file's packets again, and each frame that it returns must carry the
time that the index has for it. Where one does not, or torchcodec cannot decode the file, PyAV decodes the clip instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import require
from .errors import import_av
from .pyav import OverPyAV
from .types import Size, StrPath, VideoIndex

TORCHCODEC = "decoding with torchcodec"


def why_no_torchcodec(device: str = "cpu") -> str | None:
    """Why torchcodec cannot be used, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    try:
        import_av()
        require("torchcodec.decoders", TORCHCODEC).VideoDecoder(b"")
    except ImportError as error:
        return str(error)
    except Exception as error:  # of no video: its libraries were loaded
        text = str(error)
        if "libtorchcodec" in text:
            return "torchcodec finds no FFmpeg: it needs its shared libraries, version 4 to 9 (apt or conda install ffmpeg)"
    return None


def link_ffmpeg(folder: StrPath) -> dict[str, str]:
    """Links to the FFmpeg libraries of PyAV's wheel under the names that torchcodec looks for, for machines without an FFmpeg.

    Returns:
        The environment of a process in which torchcodec finds them, provided that it imports ``av`` first.
    """
    libraries = Path(str(import_av().__file__)).parent.parent / "av.libs"
    for library in libraries.glob("lib*.so.*"):
        if found := re.fullmatch(r"(lib(?:av|sw)\w+)-\w+\.so\.(\d+)[.\d]*", library.name):
            link = Path(folder, f"{found[1]}.so.{found[2]}")
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    path = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": f"{os.fspath(folder)}{os.pathsep + path if path else ''}"}


class TorchcodecDecoder(OverPyAV):
    """Decodes with torchcodec; what it cannot do exactly, with PyAV. ``device``: "cpu", or "cuda" for NVDEC."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def decode(self, path: StrPath, indices: Sequence[int], size: Size = None, *, index: VideoIndex | None = None) -> Tensor:
        return super().decode(path, indices, size, index=index).to(self.device)

    def exact(self, path: StrPath, wanted: list[int], size: Size, table: VideoIndex) -> Tensor | None:
        try:
            provable = table.counted is None and not table.mirrored and not table.skipped
            return self._frames(path, wanted, size, table) if provable else None
        except (RuntimeError, ValueError, IndexError):
            return None

    def _frames(self, path: StrPath, wanted: list[int], size: Size, table: VideoIndex) -> Tensor | None:
        """None where they do not carry the times of the index."""
        decoders, transforms = (require(f"torchcodec.{name}", TORCHCODEC) for name in ("decoders", "transforms"))
        shape = table.output_size(size)
        more: dict[str, Any] = {} if shape == (table.height, table.width) else {"transforms": [transforms.Resize(shape)]}
        decoder = decoders.VideoDecoder(
            os.path.abspath(os.fspath(path)), dimension_order="NHWC", num_ffmpeg_threads=1, device=self.device,
            seek_mode="exact", custom_frame_mappings=mapping(table), stream_index=table.stream, **more,
        )  # fmt: skip
        places = sorted(set(wanted))
        found = decoder.get_frames_at(places)
        times = torch.tensor(table.seconds(places), dtype=torch.float64)
        if tuple(found.data.shape[1:3]) != shape or not torch.allclose(found.pts_seconds, times, rtol=0, atol=1e-6):
            return None
        return found.data if places == wanted else found.data[[places.index(i) for i in wanted]]


def mapping(table: VideoIndex) -> str:
    """The index as torchcodec reads it: what ``ffprobe -show_frames`` prints as JSON."""
    keys = set(table.key_frames)
    ends = (*table.pts[1:], 2 * table.pts[-1] - table.pts[-2] if table.count > 1 else table.pts[-1] + 1)
    frames = [
        {"pts": pts, "duration": end - pts, "key_frame": int(i in keys)} for i, (pts, end) in enumerate(zip(table.pts, ends))
    ]
    return json.dumps({"frames": frames})
