"""PyTorch's state at import and at the first calls (inference mode, autocast, modes, defaults) stays out of later ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("_states.py")


def test_states_leave_nothing_behind():
    done = subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len(lines) == 7 + 4
    assert {digest for _, digest in lines} == {lines[0][1]}, done.stdout
