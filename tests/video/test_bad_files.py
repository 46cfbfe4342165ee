"""Whatever is wrong with a file leaves as one VideoError that says what."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from i2v_kernels.video import VideoError, decode, index, write_video

from .clips import coded_frames, encode, packet_places, run_python


def audio(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def no_moov(path: Path) -> Path:
    data = encode(path, coded_frames(30)).read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    return path


def no_frames(path: Path) -> Path:
    """A complete header, and a body of garbage."""
    encode(path, coded_frames(20), bf="0", container={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    for offset, size in packet_places(path):
        data[offset : offset + size] = b"\xff" * size
    path.write_bytes(data)
    return path


def written(data: bytes):
    return lambda path: path.write_bytes(data) and path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


BAD = {
    "missing": (lambda path: path, "no such file"),
    "directory": (folder, "is a directory"),
    "empty": (lambda path: path.write_bytes(b"") or path, "empty file"),
    "random bytes": (written(np.random.default_rng(0).bytes(50_000)), "cannot be read: Invalid data"),
    "text": (written(b"this is not a video\n" * 50), "cannot be read: Invalid data"),
    "audio only": (audio, "has no video stream"),
    "no moov": (no_moov, "cannot be read: Invalid data"),
    "no frames": (no_frames, "no frame decodes"),
    "playlist": (written(b"#EXTM3U\n#EXTINF:4,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"), "cannot be read|no "),
    "fifo": (lambda path: os.mkfifo(path) or path, "is not a regular file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file(tmp_path: Path, kind: str) -> None:
    make, reason = BAD[kind]
    path = make(tmp_path / "bad.mp4")
    for call in (index, lambda path: decode(path, [0])):
        with pytest.raises(VideoError, match=reason) as caught:
            call(path)
        assert caught.value.path == str(path)
        assert str(caught.value) == f"{path}: {caught.value.reason}"
        assert "\n" not in caught.value.reason


def test_unreadable_file() -> None:
    """Root reads everything, so root asks as nobody."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = encode(Path(folder) / "a.mp4", coded_frames(2))
        path.chmod(0)
        user = os.geteuid()
        try:
            os.seteuid(user or 65534)
            with pytest.raises(VideoError, match="ermission denied"):
                index(path)
        finally:
            os.seteuid(user)


def test_no_file_stays_open(tmp_path: Path) -> None:
    good = encode(tmp_path / "good.mp4", coded_frames(12), g="4")
    bad = [make(tmp_path / f"{i}.mp4") for i, (make, _) in enumerate(BAD.values())]
    before = len(os.listdir("/proc/self/fd"))
    for path in bad:
        with pytest.raises(VideoError):
            decode(path, [0])
    decode(good, [0, 11])
    with pytest.raises(IndexError):
        decode(good, [12])
    assert len(os.listdir("/proc/self/fd")) == before


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(VideoError(Path("a.mp4"), "broken", decodable=3)))
    assert (error.path, error.reason, error.decodable) == ("a.mp4", "broken", 3)


def test_odd_names_are_files_not_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:a.mp4", "concat:b.mp4", "-c.mp4", "ä %d.mp4"):
        encode(tmp_path / "plain.mp4", coded_frames(2)).rename(name)
        assert index(name).count == 2


def test_without_pyav() -> None:
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from i2v_kernels import video\n"
        "for use in (lambda: video.index('a.mp4'), lambda: video.ClipLoader(['a.mp4'])):\n"
        "    try: use()\n"
        "    except ImportError as error: print(error)\n"
    )
    assert run_python(code).count('pip install "i2v-kernels[video]"') == 2


def test_written_file_is_complete_or_absent(tmp_path: Path) -> None:
    frames = torch.from_numpy(coded_frames(9))
    path = tmp_path / "a.mp4"
    write_video(path, frames, 29.97, gop=4, bframes=0)
    table = index(path)
    assert (table.count, table.key_frames, table.pix_fmt) == (9, (0, 4, 8), "yuv420p")
    before = path.read_bytes()
    write_video(path, frames, 29.97, gop=4, bframes=0)
    assert path.read_bytes() == before
    for bad in ({"codec": "nope"}, {"pix_fmt": "nope"}, {"fps": 0}, {"frames": frames[:, :63]}, {"frames": frames[:0]}):
        with pytest.raises(ValueError, match="write_video: "):
            write_video(path, **({"frames": frames, "fps": 25} | bad))
    with pytest.raises(TypeError, match="must be a uint8 tensor"):
        write_video(path, frames.float(), 25)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_video(tmp_path / "nowhere" / "a.mp4", frames, 25)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == before
