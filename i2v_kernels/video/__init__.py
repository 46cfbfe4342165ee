"""Videos in: index, exact decoding, clip sampling, loaders."""

from __future__ import annotations

from .errors import VideoError
from .write import write_video

__all__ = ["VideoError", "write_video"]
