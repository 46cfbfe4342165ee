"""PyTorch's state at import and at the first calls (inference mode, autocast, modes, defaults) stays out of later ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("_states.py")


@pytest.mark.parametrize("stays", [False, True], ids=["left again", "entered again"])
def test_states_leave_nothing_behind(stays):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *(["stays"] if stays else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == (6 if stays else 10)
    assert {digest for _, digest in lines} == {lines[0][1]}, done.stdout
