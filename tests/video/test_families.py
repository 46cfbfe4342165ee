"""In files of every family, each frame is the one that decoding from the start gives, and the index says how many there are."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import av
import pytest
import torch

from i2v_kernels.video import ClipLoader, VideoIndex, counting, decode, index, pyav

from .families import COUNT, FAMILIES, coded, packed, remuxed, truth

PROVEN = {"mp4", "mov", "mkv", "webm"}  # where packets are trusted as far as they prove something
PROVABLE = {"h264", "hevc", "vp8", "vp9", "av1", "mjpeg", "prores"}


def provable(family: str) -> bool:
    codec, container = family.split(", ")
    if container == "avi":
        return codec in ("mjpeg", "huffyuv", "raw")
    return container in PROVEN and codec.split()[0] in PROVABLE


def check(path: Path, table: VideoIndex, step: int = 3) -> None:
    """That table and decoder agree with the truth, on single frames and on clips."""
    frames = truth(path, table.stream)
    assert table.count == len(frames) > 0
    alone = {*range(0, table.count, step), *range(max(0, table.count - 3), table.count)}
    wrong = [i for i in sorted(alone) if not torch.equal(decode(path, [i], index=table)[0], frames[i])]
    assert not wrong
    for seed in range(2):
        wanted = random.Random(seed).choices(range(table.count), k=7)
        assert torch.equal(decode(path, wanted, index=table), torch.stack([frames[i] for i in wanted]))
    assert all(a < b for a, b in pairwise(table.pts))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_frame_is_the_decoders(family: str, tmp_path: Path) -> None:
    path = FAMILIES[family](tmp_path / "a")
    table = index(path)
    assert table.damage is None
    assert (table.counted is None) == provable(family) or "copied" in family or "third" in family, table.counted
    check(path, table)
    if "joined" not in family and "mpeg1" not in family:
        gaps = {round(b - a, 3) for a, b in pairwise(table.seconds(range(table.count)))}
        assert gaps <= {0.04} or ("avi" in family and "copied" in family), gaps


@pytest.mark.parametrize("family", ["h264 b, ts", "h264 open, ts", "hevc open, ts", "mpeg2, mpg", "mpeg4, avi", "msmpeg4, wmv"])
def test_counting_begins_at_proven_places(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In long files; here all are long."""
    monkeypatch.setattr(counting, "SPACING", 8)
    path = FAMILIES[family](tmp_path / "a")
    table = index(path)
    assert len(table.key_frames) == len(table.marks) > 2
    assert table.key_frames[0] == 0
    check(path, table, step=1)
    seen = []
    monkeypatch.setattr(pyav, "packets_of", lambda *_: seen.append("from the start") or iter(()))
    frame = decode(path, [COUNT - 1], index=table)
    assert seen == ["from the start"], "made, not read"
    assert torch.equal(frame, decode(path, [COUNT - 1]))


def test_key_frames_that_are_none_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stream that is refreshed bit by bit, and of one with packed B-frames that says so in its first packet alone."""
    monkeypatch.setattr(counting, "SPACING", 4)
    for family in ("h264 refresh, ts", "packed, avi"):
        path = FAMILIES[family](tmp_path / "a")
        with av.open(str(path)) as file:
            assert sum(packet.is_keyframe for packet in file.demux(video=0)) > 3
        table = index(path)
        assert table.key_frames == (0,)
        check(path, table, step=1)
    stored = index(coded("h264 refresh", "mp4", tmp_path / "b"))
    assert stored.counted is None and stored.key_frames == (0,)


def test_joined_recordings_go_on(tmp_path: Path) -> None:
    table = index(FAMILIES["h264 b, ts joined"](tmp_path / "a"))
    assert table.count == 2 * COUNT
    assert table.counted is not None and "clock goes back 1 time" in table.counted
    assert {round(b - a, 3) for a, b in pairwise(table.seconds(range(2 * COUNT)))} == {0.04}


def test_a_stream_that_begins_between_key_frames(tmp_path: Path) -> None:
    """Not damaged; and its first frame has its own time."""
    whole = index(coded("h264 b", "ts", tmp_path / "whole"))
    path = FAMILIES["h264 b, ts from its sixth packet"](tmp_path / "a")
    table = index(path)
    assert (table.count, table.damage) == (COUNT - 9, None)
    assert table.seconds([0]) == pytest.approx(whole.seconds([9]))


def test_reported_times_are_those_of_the_frames_shown(tmp_path: Path) -> None:
    for family in ("packed, avi", "fields, mkv", "h264 b, ts joined"):
        path = FAMILIES[family](tmp_path / "a")
        table = index(path)
        (batch,) = ClipLoader([path], frames=5, size=32, batch_size=1)
        assert batch.pts[0].tolist() == pytest.approx(table.seconds(batch.frame_index[0].tolist()))
        assert batch.frame_index.max() < len(truth(path))


def test_what_is_behind_an_index_that_no_longer_holds(tmp_path: Path) -> None:
    """Another file under the same name: no frame of it is taken for one of the first."""
    path = coded("h264 b", "mp4", tmp_path / "a")
    table = index(path)
    coded("h264 no b", "mp4", tmp_path / "a")
    frames = truth(path)
    for i in (0, 13, COUNT - 1):
        assert torch.equal(decode(path, [i], index=table)[0], frames[i])


def test_unreferenced_frames_are_passed_over_undecoded_where_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of what comes out of the decoder, by the frame that is wanted last."""

    def decoded_for(path: Path, i: int) -> int:
        seen = []
        original = pyav.decoded
        monkeypatch.setattr(pyav, "decoded", lambda *how: (seen.append(frame) or frame for frame in original(*how)))
        decode(path, [i], index=index(path))
        monkeypatch.setattr(pyav, "decoded", original)
        return len(seen)

    assert decoded_for(coded("h264 pyramid", "mp4", tmp_path / "a"), 36) < 30
    copied = remuxed(lambda target: coded("h264 pyramid", "avi", target), "mp4", tmp_path / "b", invented=True)
    assert decoded_for(copied, 36) == 37
    assert decoded_for(packed(tmp_path / "c"), 36) == 37
