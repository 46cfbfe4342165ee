"""Indices of video files, kept between runs: one SQLite file that many processes share."""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from .types import StrPath, VideoIndex

VERSION = 1  # of what is stored; entries of others are read again
MAX_IN_MEMORY = 4096
Stamp = tuple[int, int] | None


class IndexCache:
    """``cache(path)`` is the index of a video file, read at most once for its size and time of last change.

    Args:
        read: reads the index of a file, see `i2v_kernels.video.index`. What it raises is not kept.
        file: the SQLite file, made if it is not there; None keeps the last 4096 indices in memory alone. Many processes may
            share it, on one machine. A file that cannot be used (locked for 30 s, damaged, on a full or read-only disk) is left
            alone from then on: the cache then works in memory, and ``trouble`` says why.
    """

    def __init__(self, read: Callable[[StrPath], VideoIndex], file: StrPath | None = None) -> None:
        self._read, self._file = read, None if file is None else os.path.abspath(os.fspath(file))
        self._memory: dict[str, tuple[Stamp, VideoIndex]] = {}
        self._open: tuple[int, sqlite3.Connection] | None = None  # not to be used after a fork
        self.trouble: str | None = None

    def __call__(self, path: StrPath) -> VideoIndex:
        key, stamp = os.path.abspath(os.fspath(path)), _stamp(path)
        found = self._memory.get(key)
        if found is not None and found[0] == stamp:
            return found[1]
        index = self._stored(key, stamp)
        if index is None:
            index = self._read(path)
            if stamp == _stamp(path):  # not changed meanwhile
                self._store(key, stamp, index)
        if len(self._memory) >= MAX_IN_MEMORY:
            self._memory.pop(next(iter(self._memory)))
        self._memory[key] = stamp, index
        return index

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_memory": {}}

    def _stored(self, key: str, stamp: Stamp) -> VideoIndex | None:
        query = "SELECT data FROM video_index WHERE path = ? AND size = ? AND mtime_ns = ? AND version = ?"
        row = self._run(query, key, *(stamp or (-1, -1)), VERSION)
        try:
            return None if row is None else unpack(row[0])
        except (ValueError, TypeError, KeyError, zlib.error):
            return None  # damaged: read again and written over

    def _store(self, key: str, stamp: Stamp, index: VideoIndex) -> None:
        if stamp is not None:
            self._run("INSERT OR REPLACE INTO video_index VALUES (?, ?, ?, ?, ?)", key, *stamp, VERSION, pack(index))

    def _run(self, statement: str, *values: Any) -> Any:
        """The first row of a statement's result, if the file can be used."""
        if self._file is None or self.trouble is not None:
            return None
        try:
            with self._connection() as connection:  # commits
                return connection.execute(statement, values).fetchone()
        except (sqlite3.Error, OSError) as error:
            self.trouble = f"index cache {self._file} is not used: {error}"
            return None

    def _connection(self) -> sqlite3.Connection:
        if self._open is None or self._open[0] != os.getpid():
            assert self._file is not None
            connection = sqlite3.connect(self._file, timeout=30, isolation_level="IMMEDIATE", check_same_thread=False)
            connection.execute("PRAGMA synchronous = OFF")  # a lost entry is read again
            connection.execute(
                "CREATE TABLE IF NOT EXISTS video_index "
                "(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, version INTEGER, data BLOB)"
            )
            self._open = os.getpid(), connection
        return self._open[1]


def pack(index: VideoIndex) -> bytes:
    """As JSON and, behind it, the gaps between the presentation times, compressed: some hundred bytes for most files."""
    head: dict[str, Any] = {name: getattr(index, name) for name in _PLAIN}
    head["time_base"] = [index.time_base.numerator, index.time_base.denominator]
    head["key_frames"] = list(index.key_frames)
    gaps = np.diff(np.array(index.pts, np.int64), prepend=0).astype("<i8")
    return zlib.compress(json.dumps(head).encode() + b"\n" + gaps.tobytes())


def unpack(data: bytes) -> VideoIndex:
    """The inverse of `pack`; ValueError, TypeError, KeyError or zlib.error for anything else."""
    text, _, gaps = zlib.decompress(data).partition(b"\n")
    head = json.loads(text)
    pts = tuple(np.frombuffer(gaps, "<i8").cumsum().tolist())
    if len(pts) != head["count"]:
        raise ValueError(f"{len(pts)} times for {head['count']} frames")
    more: dict[str, Any] = {"time_base": Fraction(*head["time_base"]), "key_frames": tuple(head["key_frames"]), "pts": pts}
    return VideoIndex(**{name: head[name] for name in _PLAIN}, **more)


_PLAIN = ("count", "codec", "pix_fmt", "width", "height", "rotation", "sequential", "skipped", "damage")


def _stamp(path: StrPath) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
