"""``python -m i2v_kernels.video check``: every file is told of, what is wrong with one is said, nothing stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from i2v_kernels.video import ClipLoader, index
from i2v_kernels.video.__main__ import main
from i2v_kernels.video.check import CLIP, SPACING, check_file, decoded_for
from i2v_kernels.video.sampling import tsn_test

from .clips import coded_frames, encode, packet_places
from .test_bad_files import BAD
from .test_exact import make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    encode(folder / "a.mp4", coded_frames(60), g="8", **{"x264-params": "scenecut=0"})
    encode(folder / "deep" / "long gop.mp4", coded_frames(60), g="250")
    encode(folder / "deep" / "turned.mp4", coded_frames(20), rotation=90, pts=[i * i * 10 for i in range(20)])
    torn = bytearray(encode(folder / "torn.mp4", coded_frames(60), g="8", bf="0").read_bytes())
    offset, size = packet_places(folder / "torn.mp4")[57]
    torn[offset : offset + size] = b"\xff" * size
    (folder / "torn.mp4").write_bytes(torn)
    (folder / "empty.mp4").touch()
    (folder / "notes.txt").write_text("not a video")
    return folder


def test_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cache, file = tmp_path / "index.sqlite", tmp_path / "found.json"
    assert main(["check", str(folder), "--json", str(file), "--index-cache", str(cache)]) == 1
    text = capsys.readouterr().out
    for line in (
        "3 of 5 files are good.",
        "1 of 5 files cannot be used:",
        f"{folder}/empty.mp4  empty file",
        "1 of 5 files can be used in part:",
        "only the first 57 of 60 frames decode",
        "Rotation: 1 files are stored turned",
        "Frame rate: 1 files vary theirs",
        f"-g {SPACING}",
    ):
        assert line in text, text
    found = {Path(one["path"]).name: one for one in json.loads(file.read_text())}
    assert set(found) == {"a.mp4", "long gop.mp4", "turned.mp4", "torn.mp4", "empty.mp4"}
    assert found["a.mp4"] | {"path": ""} == found["a.mp4"] | {
        "path": "", "state": "ok", "reason": "", "codec": "h264", "width": 96, "height": 64, "frames": 60, "key_frames": 8,
        "longest_gap": 8, "rotation": 0, "variable_rate": False, "seconds": pytest.approx(59 / 25),
    }  # fmt: skip
    assert found["turned.mp4"]["rotation"] == 90 and found["turned.mp4"]["variable_rate"]
    assert cache.exists()
    loader = ClipLoader([folder / "a.mp4"], index_cache=cache)
    assert loader._reader.index(folder / "a.mp4").count == 60
    assert main(["check", str(folder), "--all"]) == 1
    assert f"{folder}/deep/turned.mp4" in capsys.readouterr().out
    assert main(["check", str(folder / "a.mp4")]) == 0
    assert "nothing to gain" in capsys.readouterr().out


def test_thorough_finds_what_three_frames_do_not(tmp_path: Path) -> None:
    """Damage behind what the index reads of a picture."""
    path = encode(tmp_path / "a.mp4", coded_frames(60), "libvpx-vp9", g="4", deadline="realtime", **{"cpu-used": "8"})
    data = bytearray(path.read_bytes())
    offset, size = packet_places(path)[41]
    data[offset + 12 : offset + size] = b"\xff" * (size - 12)
    path.write_bytes(data)
    assert check_file(path, index).state == "ok"
    found = check_file(path, index, thorough=True)
    assert (found.state, found.reason.split(":")[0]) == ("part", "only the first 41 of 60 frames decode")


def test_files_that_are_counted_are_told_with_their_price(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encode(tmp_path / "a.avi", coded_frames(60), "mpeg4", g="12", bf="2")
    encode(tmp_path / "b.ts", coded_frames(60), g="12", bf="2")
    encode(tmp_path / "c.mp4", coded_frames(60), g="12", bf="2")
    assert main(["check", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    price = tsn_test(60, CLIP)[-1] + 1
    for line in (
        "Seeking: in 2 files it is not proven to lead to the frame that is meant, so frames are counted.",
        f"costs decoding the file, 60 frames (median; --index-cache keeps it), a clip of {CLIP} another {price}:",
        "avi files do not store the time of each frame (1)",
        "mpegts files do not store the time of each frame (1)",
    ):
        assert line in text, text


@pytest.mark.parametrize("kind", BAD)
def test_bad_file(kind: str, tmp_path: Path) -> None:
    path = BAD[kind][0](tmp_path / "bad.mp4")
    found = check_file(path, index)
    assert found.state == "bad" and found.reason


def test_cost_of_a_clip(tmp_path: Path) -> None:
    """Counted by hand: from each key frame, or from the frame decoded last, to each frame wanted."""
    wanted = tsn_test(50, CLIP)
    assert decoded_for(50, index(make(tmp_path, "h264 one gop")[0]).key_frames) == wanted[-1] + 1
    assert decoded_for(50, index(make(tmp_path, "h264 tiny gop")[0]).key_frames) == sum(1 + i % 2 for i in wanted)
    pairs = zip([-1, *wanted], wanted)
    assert decoded_for(50, range(0, 50, 10)) == sum(i - max(i // 10 * 10, last + 1) + 1 for last, i in pairs)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    path = encode(tmp_path / "a.mp4", coded_frames(3))
    for arguments, text in (
        ([str(tmp_path / "nowhere")], "no such folder or file"),
        ([str(empty)], "no videos in"),
        ([str(path), "--threads", "0"], "--threads must be at least 1"),
        ([str(path), "--json", str(tmp_path / "nowhere" / "a.json")], "--json: no such folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["check", *arguments])
        assert caught.value.code == 2
        assert text in capsys.readouterr().err
