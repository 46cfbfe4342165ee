"""Indices are read once for each state of a file, by however many processes, and a spoilt cache costs nothing but time."""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from i2v_kernels.video import ClipLoader, IndexCache, VideoError, index, index_cache

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


@pytest.mark.parametrize("spoil", ["bytes", "folder", "entry", "missing folder"])
def test_a_cache_that_cannot_be_used_is_left_alone(spoil: str, tmp_path: Path) -> None:
    path, file = encode(tmp_path / "a.mp4", coded_frames(5)), tmp_path / "index.sqlite"
    if spoil == "bytes":
        file.write_bytes(b"not a database" * 100)
    elif spoil == "folder":
        file.mkdir()
    elif spoil == "missing folder":
        file = tmp_path / "nowhere" / "index.sqlite"
    else:
        IndexCache(index, file)(path)
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE video_index SET data = x'00'")
    cache = IndexCache(index, file)
    assert cache(path).count == 5
    assert (cache.trouble is None) == (spoil == "entry")
    if cache.trouble is not None:
        assert str(file) in cache.trouble
    assert file.exists() == (spoil != "missing folder")


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
