"""What goes wrong with videos, and the optional dependency that reads them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType


class VideoError(Exception):
    """A video file that cannot be used.

    Attributes:
        path: the file, as a string.
        reason: why, in one line.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path, self.reason = str(path), reason
        super().__init__(self.path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def import_av() -> ModuleType:
    """The ``av`` module (PyAV), or an ImportError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"reading and writing videos needs PyAV: pip install i2v-kernels[video] ({error})") from error
    return av
