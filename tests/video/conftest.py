from __future__ import annotations

from pathlib import Path

import pytest

from i2v_kernels.video.pyav import PyAVDecoder


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
