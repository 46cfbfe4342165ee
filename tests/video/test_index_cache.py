"""Indices are read once for each state of a file, by however many processes, and a spoilt cache costs nothing but time."""

from __future__ import annotations

import dataclasses
import os
import pickle
import sqlite3
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest

from i2v_kernels.video import ClipLoader, IndexCache, VideoError, VideoIndex, index, index_cache
from i2v_kernels.video.pyav import PyAVDecoder
from i2v_kernels.video.torchcodec import TorchcodecDecoder

from .clips import coded_frames, encode
from .test_exact import FILES, make


def counting(calls: list):
    return lambda path: calls.append(path) or index(path)


@pytest.mark.parametrize("kind", ["h264 short gop", "h264 vfr", "h264 raw", "gif", "rotated 90", "one frame"])
def test_what_is_kept_is_what_was_read(kind: str, tmp_path: Path) -> None:
    table = index(make(tmp_path, kind)[0])
    found = index_cache.unpack(index_cache.pack(table))
    assert found == table
    assert [type(getattr(found, f.name)) for f in fields(found)] == [type(getattr(table, f.name)) for f in fields(table)]
    assert [type(mark) for mark in found.marks] == [type(mark) for mark in table.marks] and (table.marks or kind == "gif")
    assert kind in FILES


def test_read_once_until_the_file_changes(tmp_path: Path) -> None:
    path, calls = encode(tmp_path / "a.mp4", coded_frames(5)), []
    for _ in range(2):
        cache = IndexCache(counting(calls), tmp_path / "index.sqlite")
        assert cache(path) == cache(str(path)) == index(path)
    assert len(calls) == 1
    encode(path, coded_frames(9))
    assert cache(path).count == 9
    assert IndexCache(counting(calls), tmp_path / "index.sqlite")(path).count == 9
    assert len(calls) == 2
    assert cache.trouble is None
    again = pickle.loads(pickle.dumps(IndexCache(index, tmp_path / "index.sqlite")))
    assert again(path).count == 9


def test_errors_are_not_kept(tmp_path: Path) -> None:
    cache = IndexCache(index, tmp_path / "index.sqlite")
    path = tmp_path / "a.mp4"
    for _ in range(2):
        with pytest.raises(VideoError, match="no such file"):
            cache(path)
    encode(path, coded_frames(3))
    assert cache(path).count == 3


@pytest.mark.parametrize("spoil", ["bytes", "folder", "entry", "missing folder", "a null byte"])
def test_a_cache_that_cannot_be_used_is_left_alone_and_said(spoil: str, tmp_path: Path) -> None:
    path, file = encode(tmp_path / "a.mp4", coded_frames(5)), tmp_path / "index.sqlite"
    if spoil == "bytes":
        file.write_bytes(b"not a database" * 100)
    elif spoil == "folder":
        file.mkdir()
    elif spoil == "missing folder":
        file = tmp_path / "nowhere" / "index.sqlite"
    elif spoil == "a null byte":
        file = tmp_path / "index\0.sqlite"
    else:
        IndexCache(index, file)(path)
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE video_index SET data = x'00'")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cache = IndexCache(index, file)
        told = [str(one.message) for one in seen]
        assert cache(path).count == 5 == pickle.loads(pickle.dumps(cache))(path).count
    assert (cache.trouble is None) == (spoil == "entry")
    assert told == [str(one.message) for one in seen] == ([cache.trouble] if cache.trouble else []), "once, before it is used"
    if cache.trouble is not None:
        assert str(file).replace("\0", "\\x00") in cache.trouble
    if spoil != "a null byte":
        assert file.exists() == (spoil != "missing folder")


@pytest.mark.parametrize("trouble", ["read-only", "full", "locks fail"])
def test_a_cache_that_cannot_be_written_is_still_read(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, file = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "index.sqlite"
    for path in (old, new):
        encode(path, coded_frames(5))
    IndexCache(index, file)(old)
    connect, calls = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
            if trouble == "locks fail" and statement.startswith("INSERT"):
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(statement, *values)

    def spoilt(name: str, **options: object) -> sqlite3.Connection:
        mode = "ro" if trouble == "read-only" else "rw"
        connection = connect(f"file:{name}?mode={mode}", uri=True, factory=Connection, **options)
        if trouble == "full":
            connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
            monkeypatch.setattr(index_cache, "pack", lambda table: os.urandom(1 << 16))
        return connection

    monkeypatch.setattr(sqlite3, "connect", spoilt)
    cache = IndexCache(counting(calls), file)
    cache._version = index_cache.version(index)
    with pytest.warns(RuntimeWarning, match=f"index cache {file} is not written: ") as seen:
        assert cache(new).count == 5
        assert cache(old).count == 5
        encode(new, coded_frames(4))
        assert cache(new).count == 4
    assert len(seen) == 1 and calls == [new, new] and "is not written" in cache.trouble


def test_memory_has_a_bound(tmp_path: Path) -> None:
    """In bytes: those used longest ago are read again."""
    table, calls = index(encode(tmp_path / "a.mp4", coded_frames(3))), []
    long = replace(table, count=100_000, pts=tuple(range(10**6, 10**6 + 100_000)))
    size = index_cache.bytes_of(long)
    assert 4_000_000 <= size <= 4_200_000, "16 GiB were 4096 of these"
    for i in range(30):
        (tmp_path / f"{i}.mp4").touch()

    def read(path: Path) -> VideoIndex:
        calls.append(path)
        return replace(long, pts=tuple(range(10**6, 10**6 + 100_000)))

    cache = IndexCache(read, limit=10 * size + 20_000)
    tracemalloc.start()
    for i in [*range(10), *range(5), *range(10, 30)]:
        cache(tmp_path / f"{i}.mp4")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 9 * size < held < 11 * size
    assert len(calls) == 30
    cache(tmp_path / "25.mp4")
    assert len(calls) == 30, "still there"
    cache(tmp_path / "4.mp4")
    assert len(calls) == 31, "went"
    assert IndexCache(read)._limit == index_cache.MAX_BYTES == 128 << 20
    small = IndexCache(read, limit=0)
    assert small(tmp_path / "0.mp4") is small(tmp_path / "0.mp4"), "the last is kept for the next views of its video"


def test_most_recently_used_stay(tmp_path: Path) -> None:
    table, calls = index(encode(tmp_path / "a.mp4", coded_frames(3))), []
    paths = [tmp_path / f"{i}.mp4" for i in range(3)]
    for path in paths:
        path.touch()
    cache = IndexCache(lambda path: calls.append(path) or table, limit=2 * (index_cache.bytes_of(table) + 1024))
    for i in (0, 1, 0, 2, 0, 1):
        cache(paths[i])
    assert calls == [paths[0], paths[1], paths[2], paths[1]]


@pytest.mark.parametrize("change", ["field", "version", "reader", "PyAV"])
def test_an_entry_of_another_index_is_not_read(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, file, calls = encode(tmp_path / "a.mp4", coded_frames(5)), tmp_path / "index.sqlite", []
    read = counting(calls)
    for _ in range(2):
        IndexCache(read, file)(path)
    assert len(calls) == 1
    if change == "field":
        wider = dataclasses.make_dataclass("VideoIndex", [("more", int, 0)], bases=(VideoIndex,), frozen=True)
        monkeypatch.setattr(index_cache, "VideoIndex", wider)
    elif change == "version":
        monkeypatch.setattr(index_cache.types, "VERSION", "another", raising=False)
    elif change == "PyAV":
        monkeypatch.setattr(index_cache.importlib.metadata, "version", lambda name: "99")
    else:
        calls.append(0)
        read = PyAVDecoder().index
    cache = IndexCache(read, file)
    cache._read = lambda path: calls.append(path) or index(path)
    assert cache(path).count == 5
    assert len(calls) == 2 + (change == "reader")


def test_decoders_that_read_alike_share_entries() -> None:
    """All of the package's read with PyAV, `check` too."""
    assert index_cache.version(PyAVDecoder().index) == index_cache.version(TorchcodecDecoder().index)


def test_many_processes_share_it(tmp_path: Path) -> None:
    for i in range(8):
        encode(tmp_path / f"{i}.mp4", coded_frames(5 + i))
    code = (
        "import sys; from pathlib import Path; from i2v_kernels.video import IndexCache, index\n"
        "folder = Path(sys.argv[1]); cache = IndexCache(index, folder / 'index.sqlite')\n"
        "print([cache(folder / f'{i}.mp4').count for i in range(8)], cache.trouble)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for process in processes:
        assert process.communicate()[0].strip() == "[5, 6, 7, 8, 9, 10, 11, 12] None"
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        assert connection.execute("SELECT COUNT(*) FROM video_index").fetchone() == (8,)


def test_loader_keeps_indices_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [encode(tmp_path / f"{i}.mp4", coded_frames(20)) for i in range(4)]
    how = {"frames": 4, "size": 32, "batch_size": 2, "index_cache": tmp_path / "index.sqlite"}
    first = [batch.frames for batch in ClipLoader(paths, workers=2, **how)]
    loader = ClipLoader(paths, **how)
    monkeypatch.setattr(loader._reader.index, "_read", lambda path: pytest.fail("read again"))
    assert all((a == b.frames).all() for a, b in zip(first, loader))
    assert os.path.exists(how["index_cache"])
