"""What goes wrong with videos, and the optional dependency that reads them."""

from __future__ import annotations

import os
from typing import Any

from ..extras import missing, require

VIDEOS = "reading and writing videos"


class VideoError(Exception):
    """A video file that cannot be used as asked.

    Attributes:
        path: the file, as a string.
        reason: why, in one line.
        decodable: where only the first part of the file decodes, how many frames that is; else None.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, decodable: int | None = None) -> None:
        self.path, self.reason, self.decodable = os.fspath(path), reason, decodable
        super().__init__(self.path, reason, decodable)

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


def shown(text: object) -> str:
    """Text that can be printed in one line everywhere: bytes that are not UTF-8 and control characters are escaped."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    byte = ord(letter) - 0xDC00  # how os.fsdecode keeps a byte
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else letter.encode("unicode_escape").decode()


def import_av() -> Any:
    """The ``av`` module (PyAV), or an ImportError that says how to install it."""
    av = require("av", VIDEOS)
    if int(av.__version__.split(".")[0]) < 17:
        raise ImportError(f"{missing('av', VIDEOS)} (17 or newer; found {av.__version__})")
    return av
