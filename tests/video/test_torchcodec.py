"""torchcodec behind our index, in a process that finds FFmpeg's libraries: they are looked for when a process starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from i2v_kernels.video import choose_backend
from i2v_kernels.video.torchcodec import link_ffmpeg, why_no_torchcodec

pytest.importorskip("torchcodec")


def test_torchcodec(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "av", str(Path(__file__).with_name("_torchcodec.py"))]
    command += ["--rootdir", str(Path(__file__).parents[2]), "--basetemp", str(tmp_path / "run")]
    root, environment = Path(__file__).parents[2], link_ffmpeg(tmp_path)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_it_says_what_is_missing() -> None:
    if (reason := why_no_torchcodec()) is None:
        pytest.skip("this machine has an FFmpeg")
    assert "finds no FFmpeg" in reason
    with pytest.raises(ImportError, match="'torchcodec' cannot run: torchcodec finds no FFmpeg"):
        choose_backend("torchcodec")
