"""Decoded frames are exactly those asked for, in every kind of file."""

from __future__ import annotations

import random
from pathlib import Path

import av
import pytest
import torch

from i2v_kernels.video import VideoError, decode, index, pyav

from .clips import coded_frames, decode_all, encode, packet_places, read_number, sample_clips

COUNT = 50
X265 = "log-level=none:keyint=12"
FILES: dict[str, tuple[str, dict]] = {
    "h264 short gop": ("a.mp4", {"g": "8", "bf": "3"}),
    "h264 tiny gop": ("a.mp4", {"g": "2", "bf": "1"}),
    "h264 one gop": ("a.mp4", {"g": "250", "bf": "3"}),
    "h264 open gop": ("a.mp4", {"x264-params": "open-gop=1:keyint=10:min-keyint=1:bframes=3:scenecut=0"}),
    "h264 open gop mkv": ("a.mkv", {"x264-params": "open-gop=1:keyint=10:min-keyint=1:bframes=3:scenecut=0"}),
    "h264 mkv": ("a.mkv", {"g": "8"}),
    "h264 fragmented": ("a.mp4", {"g": "8", "container": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264 10 bit": ("a.mp4", {"g": "8", "pix_fmt": "yuv420p10le"}),
    "h264 4:4:4": ("a.mp4", {"g": "8", "pix_fmt": "yuv444p"}),
    "h264 vfr": ("a.mp4", {"g": "8", "pts": [7 * i * i + 20 * i + i % 3 for i in range(COUNT)]}),
    "h264 ts": ("a.ts", {"g": "8", "bf": "3"}),
    "h264 raw": ("a.h264", {"g": "8", "bf": "3"}),
    "hevc": ("a.mp4", {"codec": "libx265", "x265-params": X265, "preset": "ultrafast"}),
    "hevc open gop": ("a.mkv", {"codec": "libx265", "x265-params": X265 + ":open-gop=1:bframes=3"}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "vp9 odd size": ("a.webm", {"codec": "libvpx-vp9", "size": (61, 83), "deadline": "realtime", "cpu-used": "8"}),
    "av1": ("a.mp4", {"codec": "libsvtav1", "g": "12", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4": ("a.mp4", {"codec": "mpeg4", "g": "12", "bf": "2"}),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", "g": "12"}),
    "mjpeg": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    "one frame": ("a.mp4", {"count": 1}),
    "rotated 90": ("a.mp4", {"rotation": 90, "g": "8"}),
    "rotated 180": ("a.mp4", {"rotation": 180}),
    "rotated 270": ("a.mp4", {"rotation": 270}),
}
COUNTED = {"h264 raw", "h264 ts", "mpeg4", "mpeg4 avi", "gif"}  # no packet of these proves which frame it is


def make(folder: Path, kind: str) -> tuple[Path, int]:
    name, how = FILES[kind]
    how = dict(how)
    count = how.pop("count", COUNT)
    return encode(folder / name, coded_frames(count, *how.pop("size", (64, 96))), **how), count


@pytest.mark.parametrize("kind", FILES)
def test_exactly_the_frames_asked_for(tmp_path: Path, kind: str) -> None:
    path, count = make(tmp_path, kind)
    table = index(path)
    assert table.count == count
    assert table.rotation == FILES[kind][1].get("rotation", 0)
    assert (table.counted is not None) == (kind in COUNTED)
    assert table.damage is None
    truth = decode_all(path, table.rotation)
    assert truth.shape[1:3] == (table.height, table.width)
    for i in range(count):
        assert torch.equal(decode(path, [i], index=table)[0], truth[i]), i
    wanted = random.Random(0).choices(range(count), k=12)
    clip = decode(path, wanted)
    assert torch.equal(clip, truth[wanted])
    assert [read_number(frame) for frame in clip] == wanted
    # In every size: still the same frames.
    assert [read_number(frame) for frame in decode(path, wanted, (48, 48), index=table)] == wanted


def test_rotation_is_that_of_the_picture_before_it_was_stored(tmp_path: Path) -> None:
    frames = coded_frames(3)
    frames[:, :32, :48] = (250, 0, 0)
    for rotation in (0, 90, 180, 270):
        path = encode(tmp_path / f"{rotation}.mp4", frames, rotation=rotation, pix_fmt="yuv444p", crf="1")
        table, clip = index(path), decode(path, [1])
        assert (table.rotation, table.height, table.width) == (rotation, 64, 96)
        assert (clip[0].int() - torch.from_numpy(frames[1]).int()).abs().float().mean() < 4


@pytest.mark.parametrize("kind", ["h264 short gop", "h264 mkv", "h264 open gop", "hevc", "vp9", "av1", "h264 vfr"])
def test_these_files_are_seeked_in(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, count = make(tmp_path, kind)
    monkeypatch.setattr(pyav, "_from_the_start", lambda *_: pytest.fail("decoded from the start"))
    assert index(path).counted is None
    assert [read_number(frame) for frame in decode(path, [count - 1, 3, count // 2])] == [count - 1, 3, count // 2]


@pytest.mark.parametrize("path", sample_clips(), ids=lambda path: path.stem)
def test_real_clips(path: Path) -> None:
    table = index(path)
    truth = decode_all(path)
    wanted = [table.count - 1, 0, table.count // 2, 7, 7, 77]
    assert table.count == len(truth)
    assert torch.equal(decode(path, wanted, index=table), truth[wanted])


def test_index_of_a_file(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", coded_frames(24), g="8", bf="2", **{"x264-params": "scenecut=0"})
    table = index(path)
    assert (table.codec, table.pix_fmt, table.width, table.height) == ("h264", "yuv420p", 96, 64)
    assert table.key_frames == (0, 8, 16)
    assert list(table.pts) == sorted(set(table.pts))
    assert table.seconds([0, 5, 23]) == pytest.approx([0, 0.2, 0.92])
    assert len({table, index(path)}) == 1


def test_pts_of_variable_frame_rate(tmp_path: Path) -> None:
    pts = [0, 10, 400, 410, 1000, 5000]
    table = index(encode(tmp_path / "a.mkv", coded_frames(6), pts=pts))
    assert table.seconds(range(6)) == pytest.approx([t / 1000 for t in pts])


def test_frames_cut_away_by_an_edit_list_do_not_count(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", coded_frames(40), g="16", bf="2")
    path = tmp_path / "trimmed.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (t - round(0.2 / packet.time_base) for t in (packet.pts, packet.dts))
                packet.stream = stream
                target.mux(packet)
    table = index(path)
    assert table.count == len(decode_all(path)) == 35
    assert table.damage is None
    assert [read_number(frame) for frame in decode(path, [0, 34, 20])] == [5, 39, 25]


def test_size(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", coded_frames(2, 64, 96), rotation=90)
    tall = encode(tmp_path / "b.mp4", coded_frames(2, 96, 64))
    assert decode(path, [1]).shape == (1, 64, 96, 3)
    assert decode(path, [1], 32).shape == (1, 32, 48, 3)
    assert decode(tall, [1], 33).shape == (1, 50, 33, 3)
    assert decode(path, [1, 0, 1], (20, 30)).shape == (3, 20, 30, 3)
    assert decode(path, [], 32).shape == (0, 32, 48, 3)
    assert decode(path, [0]).dtype == torch.uint8
    for size in (0, -3, (1, 2, 3), (4, 0), 2.5):
        with pytest.raises(ValueError, match="size must be"):
            decode(path, [0], size)


def test_numbers_outside_the_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", coded_frames(3))
    for i in (3, -1):
        with pytest.raises(IndexError, match=rf"indices\[1\]={i} is not in 0\.\.2"):
            decode(path, [0, i])
    with pytest.raises(TypeError):
        decode(path, [0.5])  # type: ignore[list-item]


def test_truncated_file_gives_the_frames_that_are_there(tmp_path: Path) -> None:
    whole = encode(tmp_path / "a.mp4", coded_frames(COUNT), g="8", bf="2", container={"movflags": "faststart"})
    truth = decode_all(whole)
    cut = tmp_path / "cut.mp4"
    offset, size = packet_places(whole)[COUNT // 2]
    for end, there in ((offset, COUNT // 2), (offset + size // 2, COUNT // 2)):
        cut.write_bytes(whole.read_bytes()[:end])
        table = index(cut)
        assert table.count == there
        assert table.damage == f"truncated: {there} of {COUNT} frames are there"
        numbers = [read_number(frame) for frame in decode(cut, range(there))]
        # Packets are stored in coding order: near the cut a B-frame may be missing between two frames.
        assert numbers == sorted(numbers)
        assert numbers[: there - 3] == list(range(there - 3))
        assert torch.equal(decode(cut, [there - 4, 2]), truth[[there - 4, 2]])


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_bit_errors_end_the_usable_part(codec: str, tmp_path: Path) -> None:
    """What the first bytes of a picture show is known to the index; what its body hides, when it is decoded."""
    options = {"libx264": {"bf": "0"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}[codec]
    path = encode(tmp_path / "a.mp4", coded_frames(COUNT), codec, g="8", **options)
    truth = decode_all(path)
    offset, size = packet_places(path)[29]
    data = bytearray(path.read_bytes())
    kept = 12 if codec == "libvpx-vp9" else 0
    data[offset + kept : offset + size] = b"\xff" * (size - kept)
    path.write_bytes(data)
    table = index(path)
    assert torch.equal(decode(path, [28, 3]), truth[[28, 3]])
    if kept:
        assert (table.count, table.damage) == (COUNT, None)
        with pytest.raises(VideoError, match="only the first 29 of 50 frames decode") as caught:
            decode(path, [3, 30])
        assert caught.value.decodable == 29
    else:
        assert table.count == 29
        assert table.damage is not None and table.damage.startswith("only the first 29 of 50 frames decode: Invalid data")
        assert table.counted == "packet 29 cannot be understood"
