"""Indices of video files, kept between runs: one SQLite file that many processes share."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sqlite3
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from fractions import Fraction
from threading import Lock
from typing import Any, get_args, get_type_hints

import numpy as np

from . import types
from .errors import shown
from .types import StrPath, VideoIndex

VERSION = 2  # of what `pack` writes
MAX_BYTES = 128 << 20  # of indices in memory, in each process
Stamp = tuple[int, int] | None
_FAILURES = (sqlite3.Error, sqlite3.Warning, OSError, ValueError, OverflowError)


class IndexCache:
    """``cache(path)`` is the index of a video file, read at most once for its size and time of last change.

    Args:
        read: reads the index of a file, see `i2v_kernels.video.index`. What it raises is not kept.
        file: the SQLite file, made if it is not there; None keeps indices in memory alone. Many processes may share it, on one
            machine. A file that cannot be used (missing folder, locked for 30 s, damaged) is left alone from then on: the cache
            then works in memory. One that cannot be written (a full or read-only disk) is still read. A warning says why, once,
            and so does ``trouble``.
        limit: bytes of indices in memory, about; those used longest ago go first. 128 MiB are those of 3 million frames.

    An entry is read again where the fields of `VideoIndex`, what makes it (``read``, PyAV) or the way it is stored has changed.
    """

    def __init__(self, read: Callable[[StrPath], VideoIndex], file: StrPath | None = None, *, limit: int = MAX_BYTES) -> None:
        self._read, self._file = read, None if file is None else os.path.abspath(os.fspath(file))
        self._limit, self._version = limit, version(read)
        self._memory: dict[str, tuple[Stamp, VideoIndex, int]] = {}
        self._bytes = 0
        self._lock = Lock()
        self._open: tuple[int, sqlite3.Connection] | None = None  # not to be used after a fork
        self._reads = self._writes = self._file is not None
        self.trouble: str | None = None
        # Known before anything is read, and said once rather than by every worker.
        self._run("SELECT 1 FROM video_index LIMIT 1")
        self._close()

    def __call__(self, path: StrPath) -> VideoIndex:
        key, stamp = os.path.abspath(os.fspath(path)), _stamp(path)
        with self._lock:
            found = self._memory.pop(key, None)
            if found is not None:
                self._memory[key] = found  # now the last to go
        if found is not None and found[0] == stamp:
            return found[1]
        index = None if stamp is None else self._stored(key, stamp)
        if index is None:
            index = self._read(path)
            if stamp == _stamp(path):  # not changed meanwhile
                self._store(key, stamp, index)
        self._keep(key, stamp, index)
        return index

    def _keep(self, key: str, stamp: Stamp, index: VideoIndex) -> None:
        """In memory; one that is greater than the limit stays until the next comes."""
        size = 1024 + bytes_of(index)
        with self._lock:
            old = self._memory.pop(key, None)
            self._bytes += size - (old[2] if old else 0)
            while self._memory and self._bytes > self._limit:
                self._bytes -= self._memory.pop(next(iter(self._memory)))[2]
            self._memory[key] = stamp, index, size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_memory": {}, "_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": Lock()}

    def _stored(self, key: str, stamp: tuple[int, int]) -> VideoIndex | None:
        query = "SELECT data FROM video_index WHERE path = ? AND size = ? AND mtime_ns = ? AND version = ?"
        row = self._run(query, os.fsencode(key), *stamp, self._version)
        try:
            return None if row is None else unpack(row[0])
        except (ValueError, TypeError, KeyError, AttributeError, zlib.error):
            return None  # damaged: read again and written over

    def _store(self, key: str, stamp: Stamp, index: VideoIndex) -> None:
        if stamp is not None and self._writes:
            values = os.fsencode(key), *stamp, self._version, pack(index)
            self._run("INSERT OR REPLACE INTO video_index VALUES (?, ?, ?, ?, ?)", *values)

    def _run(self, statement: str, *values: Any) -> Any:
        """The first row of a statement's result, if the file can be used."""
        if not self._reads or self._file is None:
            return None
        try:
            with self._connection(self._file) as connection:  # commits
                return connection.execute(statement, values).fetchone()
        except _FAILURES as error:
            storing = statement.startswith("INSERT")
            if self.trouble is None:
                self.trouble = f"index cache {shown(self._file)} is not {'written' if storing else 'used'}: {error}"
                warnings.warn(self.trouble, RuntimeWarning, stacklevel=3)
            self._reads, self._writes = storing, False
            return None

    def _connection(self, file: str) -> sqlite3.Connection:
        if self._open is None or self._open[0] != os.getpid():
            connection = sqlite3.connect(file, timeout=30, isolation_level="IMMEDIATE", check_same_thread=False)
            connection.execute("PRAGMA synchronous = OFF")  # a lost entry is read again
            connection.execute(
                "CREATE TABLE IF NOT EXISTS video_index "
                "(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, version INTEGER, data BLOB)"
            )
            self._open = os.getpid(), connection
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def version(read: Callable[[StrPath], VideoIndex]) -> str:
    """Of all that decides what an index says: its fields, who reads it, and how it is stored."""
    reader = f"{read.__module__}.{getattr(read, '__qualname__', type(read).__qualname__)}"
    try:
        av = importlib.metadata.version("av")
    except importlib.metadata.PackageNotFoundError:
        av = ""
    index = [(name, str(kind), getattr(_item(kind), "_fields", ())) for name, kind in get_type_hints(VideoIndex).items()]
    return f"{zlib.crc32(repr([VERSION, types.VERSION, reader, av, index]).encode()):08x}-{VERSION}"


def _item(kind: Any) -> Any:
    """What a ``tuple[X, ...]`` is made of."""
    return (*get_args(kind), None)[0]


def bytes_of(value: Any) -> int:
    """Memory that an index takes, about: 40 bytes for each time in a tuple of ints; the last item stands for all."""
    if is_dataclass(value):
        return sum(bytes_of(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    more = len(value) * bytes_of(value[-1]) if isinstance(value, tuple) and value else 0
    return -(-sys.getsizeof(value) // 16) * 16 + more


def pack(index: VideoIndex) -> bytes:
    """As JSON and, behind it, the gaps between the numbers of its rows, compressed: some hundred bytes for most files."""
    head: dict[str, Any] = {}
    rows: list[bytes] = []
    for field in fields(index):
        value = getattr(index, field.name)
        if isinstance(value, Fraction):
            value = {"fraction": [value.numerator, value.denominator]}
        elif isinstance(value, tuple) and all(type(item) is int for item in value):
            rows.append(np.diff(np.array(value, "<i8"), prepend=0).astype("<i8").tobytes())
            value = {"row": len(value)}
        elif isinstance(value, tuple):
            value = {"items": value}
        head[field.name] = value
    return zlib.compress(json.dumps(head).encode() + b"\n" + b"".join(rows))


def unpack(data: bytes) -> VideoIndex:
    """The inverse of `pack`; ValueError, TypeError, KeyError or zlib.error for anything else."""
    text, _, rows = zlib.decompress(data).partition(b"\n")
    head, kinds = json.loads(text), get_type_hints(VideoIndex)
    for name, value in head.items():
        match value:
            case {"fraction": [above, below]}:
                head[name] = Fraction(above, below)
            case {"items": items}:
                make = _item(kinds[name])
                head[name] = tuple(make(*item) if hasattr(make, "_fields") else item for item in items)
            case {"row": count}:
                if len(rows) < 8 * count:
                    raise ValueError(f"{len(rows) // 8} numbers where {count} are expected")
                row, rows = np.frombuffer(rows[: 8 * count], "<i8").cumsum(), rows[8 * count :]
                head[name] = tuple(row.tolist())
    index = VideoIndex(**head)
    if len(index.pts) != index.count:
        raise ValueError(f"{len(index.pts)} times for {index.count} frames")
    return index


def _stamp(path: StrPath) -> Stamp:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the reader says what is wrong with it
        return None
    return status.st_size, status.st_mtime_ns
