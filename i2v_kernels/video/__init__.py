"""Videos in: index, exact decoding, clip sampling, loaders."""

from __future__ import annotations

from .backends import choose_backend, decode, index, register_backend
from .batch import Batch, Report
from .errors import VideoError
from .index_cache import IndexCache
from .loader import ClipLoader
from .sampling import SAMPLERS, get_sampler
from .sources import Sources, Video, read_sources
from .types import Decoder, VideoIndex
from .write import write_video

__all__ = [
    "SAMPLERS",
    "Batch",
    "ClipLoader",
    "Decoder",
    "IndexCache",
    "Report",
    "Sources",
    "Video",
    "VideoError",
    "VideoIndex",
    "choose_backend",
    "decode",
    "get_sampler",
    "index",
    "read_sources",
    "register_backend",
    "write_video",
]
