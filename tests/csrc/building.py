"""Builds of the extension that tests need beside the installed one, each made once for a state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def build(tag: str, **switches: str) -> Path:
    """A folder to put on PYTHONPATH, whose ``i2v_kernels`` is this tree's Python code with an extension built so.

    ``switches`` are the environment variables of ``setup.py``. The folder lies under ``build/``, which git ignores.
    """
    sources = [ROOT / "setup.py", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    key = hashlib.sha256(repr((sys.version, torch.__version__, sorted(switches.items()))).encode())
    for path in sources:
        key.update(path.name.encode() + path.read_bytes())
    place = ROOT / "build" / "tests" / f"{tag}-{key.hexdigest()[:16]}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        for stale in place.parent.glob(f"{tag}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            tree = Path(folder, "tree")
            _compile(tree, switches)
            if not place.exists():  # else another run was faster
                tree.rename(place)
    _link_python(place)
    return place


def _compile(tree: Path, switches: dict[str, str]) -> None:
    tree.joinpath("i2v_kernels").mkdir(parents=True)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copy(ROOT / "setup.py", tree)  # alone: without pyproject.toml it builds the extension and nothing else
    environment = {"MAX_JOBS": str(os.cpu_count()), **os.environ, **switches}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or not list(tree.glob("i2v_kernels/_C*")):
        raise RuntimeError(f"{' '.join(command)} with {switches}:\n{(done.stdout + done.stderr)[-6000:]}")
    shutil.rmtree(tree / "build", ignore_errors=True)


def _link_python(tree: Path) -> None:
    """Links, not copies: Python code that changed since the build is seen."""
    package = tree / "i2v_kernels"
    for link in package.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink()
    for path in (ROOT / "i2v_kernels").iterdir():
        link = package / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not link.exists():
            link.symlink_to(path)
