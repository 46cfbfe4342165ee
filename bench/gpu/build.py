"""Builds the extension in place, and looks whether it loads with its CUDA kernels."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import place


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.build", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    options = parser.parse_args(argv)
    code = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=place.ROOT).returncode
    check = "from i2v_kernels import _extension; print(_extension.why_no_cuda() or 'it loads')"
    done = subprocess.run([sys.executable, "-c", check], cwd=place.ROOT, capture_output=True, text=True)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines() or [""]
    good = code == 0 and said[-1] == "it loads"
    note = f"built with status {code}; {said[-1]}"
    print(note)
    return place.evidence(options.work / "build.json", int(good), int(not good), note)


if __name__ == "__main__":
    sys.exit(main())
