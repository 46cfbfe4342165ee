from __future__ import annotations

from pathlib import Path

import pytest

from i2v_kernels.video.pyav import PyAVDecoder

from .clips import COUNT, VIDEOS, coded_frames, encode


@pytest.fixture
def by_pyav(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that PyAV decodes frames of, as they come."""
    seen: list[Path] = []
    original = PyAVDecoder.decode

    def spy(self, path, *args, **options):
        seen.append(Path(path))
        return original(self, path, *args, **options)

    monkeypatch.setattr(PyAVDecoder, "decode", spy)
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven videos in the class folders "ape" and "bee"."""
    root = tmp_path_factory.mktemp("videos")
    first = encode(root / "first.mp4", coded_frames(COUNT, 32, 64), g="8", preset="ultrafast")
    for i in range(VIDEOS):
        (root / "data" / ("ape", "bee")[i % 2]).mkdir(parents=True, exist_ok=True)
        (root / "data" / ("ape", "bee")[i % 2] / f"{i}.mp4").write_bytes(first.read_bytes())
    (root / "data" / "ape" / "notes.txt").write_text("not a video")
    (root / "data" / "bee" / ".part.mp4").write_text("half written")
    return root / "data"
