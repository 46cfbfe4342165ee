"""Builds of the extension, each made once for a state of its sources, whatever clone asks: tests need some besides.

``python -m tests.csrc.building`` puts the ordinary one into ``i2v_kernels/``; environment variables as for ``setup.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
import torch

from bench import cache

ROOT = Path(__file__).resolve().parents[2]
NAME = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
VARIABLES = ("CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDA_HOME", "NVCC_APPEND_FLAGS", "TORCH_CUDA_ARCH_LIST")
SWITCHES = ("BUILD_CUDA", "SANITIZE", "FAST_BUILD", "VERBOSE")


def build(tag: str, **switches: str) -> Path:
    """A folder to put on PYTHONPATH, whose ``i2v_kernels`` is this tree's Python code with an extension built so.

    ``switches`` are the environment variables of ``setup.py``. The folder lies under ``build/``, which git ignores.
    """
    made = extension(**switches)
    place = ROOT / "build" / "tests" / f"{tag}-{made.stem}"
    package = place / "i2v_kernels"
    package.mkdir(parents=True, exist_ok=True)
    _link(package / NAME, made)
    for link in package.iterdir():
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)
    for path in (ROOT / "i2v_kernels").iterdir():  # links, not copies: Python code that changed since the build is seen
        if path.suffix != ".so" and path.name != "__pycache__":
            _link(package / path.name, path)
    return place


def extension(root: Path = ROOT, **switches: str) -> Path:
    """The extension of the state of the sources in ``root``: from the cache of builds, or compiled."""
    environment = {"MAX_JOBS": str(os.cpu_count()), **os.environ, **switches}
    sources = [root / "setup.py", *sorted(path for path in (root / "csrc").rglob("*") if path.is_file())]
    variables = (*VARIABLES, *(f"I2V_KERNELS_{switch}" for switch in SWITCHES))
    chosen = {name: environment[name] for name in variables if environment.get(name)}
    facts = (sys.version, torch.__version__, pybind11.__version__, sorted(chosen.items()), *map(_version, _compilers(chosen)))
    key = hashlib.sha256(repr(facts).encode())
    for path in sources:
        key.update(str(path.relative_to(root)).encode() + path.read_bytes())
    made = cache.folder("builds") / f"{key.hexdigest()[:24]}.so"
    if made.exists():
        with contextlib.suppress(OSError):
            os.utime(made)
        return made
    cache.prune("builds")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        tree.joinpath("i2v_kernels").mkdir()
        shutil.copytree(root / "csrc", tree / "csrc")
        shutil.copy(root / "setup.py", tree)  # alone: without pyproject.toml it builds the extension and nothing else
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        built = tree / "i2v_kernels" / NAME
        if done.returncode != 0 or not built.exists():
            raise RuntimeError(f"{' '.join(command)} with {chosen}:\n{(done.stdout + done.stderr)[-6000:]}")
        _put(built, made)
    return made


def _compilers(chosen: dict[str, str]) -> tuple[str, ...]:
    homes = (chosen.get("CUDA_HOME"), "/usr/local/cuda")
    return chosen.get("CXX") or "c++", "nvcc", *(str(Path(home, "bin", "nvcc")) for home in homes if home)


def _version(compiler: str) -> str:
    try:
        return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""


def _put(source: Path, target: Path) -> None:
    """A copy that is whole or not there."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    shutil.copy2(source, beside)
    beside.replace(target)


def _link(link: Path, target: Path) -> None:
    if not link.exists():
        with contextlib.suppress(FileExistsError):  # another process was faster
            link.symlink_to(target)


if __name__ == "__main__":
    print("i2v-kernels: the extension is compiled, which takes minutes, or taken from", cache.folder("builds"), flush=True)
    _put(extension(), ROOT / "i2v_kernels" / NAME)
