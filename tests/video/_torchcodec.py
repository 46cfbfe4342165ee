"""torchcodec behind our index: run by test_torchcodec.py in a process that finds an FFmpeg."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from i2v_kernels.video import ClipLoader, VideoError, choose_backend, decode, index

from .clips import coded_frames, decode_all, encode, packet_places, read_number, sample_clips
from .test_bad_files import BAD
from .test_exact import COUNTED, FILES, make

BY_PYAV = COUNTED  # where torchcodec alone gives other frames, or none


@pytest.mark.parametrize("kind", FILES)
def test_same_bits_as_decoding_everything(kind: str, tmp_path: Path, by_pyav: list[Path]) -> None:
    path, count = make(tmp_path, kind)
    table = index(path)
    truth = decode_all(path, table.rotation)
    wanted = random.Random(1).choices(range(count), k=9)
    clip = decode(path, wanted, backend="torchcodec")
    assert by_pyav == ([path] if kind in BY_PYAV else [])
    assert [read_number(frame) for frame in clip] == wanted
    apart = (clip.int() - truth[wanted].int()).abs()
    assert apart.max() <= (kind == "vp9 odd size"), "the same bits; the last odd column's colour is rounded otherwise"
    small = decode(path, wanted, (48, 48), index=table, backend="torchcodec")
    assert [read_number(frame) for frame in small] == wanted
    assert (small.int() - decode(path, wanted, (48, 48), index=table).int()).abs().float().mean() < 2


@pytest.mark.parametrize("path", sample_clips(), ids=lambda path: path.stem)
def test_real_clips(path: Path, by_pyav: list[Path]) -> None:
    truth = decode_all(path)
    wanted = [len(truth) - 1, 0, len(truth) // 2, 7, 7, 77]
    assert torch.equal(decode(path, wanted, backend="torchcodec"), truth[wanted])
    assert by_pyav == []


@pytest.mark.parametrize("kind", BAD)
def test_bad_file(kind: str, tmp_path: Path) -> None:
    make_bad, reason = BAD[kind]
    path = make_bad(tmp_path / "bad.mp4")
    with pytest.raises(VideoError, match=reason):
        decode(path, [0], backend="torchcodec")


def test_numbers_outside_the_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", coded_frames(3))
    for i in (3, -1):
        with pytest.raises(IndexError, match=rf"indices\[1\]={i} is not in 0\.\.2"):
            decode(path, [0, i], backend="torchcodec")
    with pytest.raises(TypeError):
        decode(path, [0.5], backend="torchcodec")  # type: ignore[list-item]
    assert decode(path, [], 32, backend="torchcodec").shape == (0, 32, 48, 3)


def test_loader(tmp_path: Path) -> None:
    """The batches of PyAV, whatever is wrong with a file."""
    paths = [encode(tmp_path / f"{i}.mp4", coded_frames(30, 48, 96), g="8", bf="0") for i in range(5)]
    offset, size = packet_places(paths[1])[17]
    torn = bytearray(paths[1].read_bytes())
    torn[offset : offset + size] = b"\xff" * size
    paths[1].write_bytes(torn)
    paths[3].write_bytes(b"")
    how = {"frames": 6, "size": 32, "batch_size": 2, "views": (1, 3)}
    mine, theirs = (ClipLoader(paths, backend=name, workers=1, **how) for name in ("torchcodec", "pyav"))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.frame_index, b.frame_index) and torch.equal(a.item, b.item)
        assert (a.frames.int() - b.frames.int()).abs().float().mean() < 2
    assert mine.report().bad == theirs.report().bad
    assert {Path(path).name for path in mine.report().bad} == {"1.mp4", "3.mp4"}


def test_it_is_there() -> None:
    assert choose_backend("torchcodec")[0] == "torchcodec"
    assert choose_backend()[0] == "pyav"
