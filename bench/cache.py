"""What is expensive to make and depends on nothing but its inputs is kept outside the clone, named by a hash of these.

The folder is ``$I2V_KERNELS_CACHE``, else ``i2v-kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It may be deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

UNUSED = 30 * 86400  # seconds after which what nobody asked for is removed


def folder(kind: str) -> Path:
    """Where things of this kind are kept; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(os.environ.get("I2V_KERNELS_CACHE") or Path(base) / "i2v-kernels") / kind
    place.mkdir(parents=True, exist_ok=True)
    return place


def load(kind: str, key: str) -> Any:
    """What ``store`` was given, or None: not there, or damaged."""
    path = folder(kind) / key
    try:
        value = json.loads(zlib.decompress(path.read_bytes()))
    except (OSError, zlib.error, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return value


def store(kind: str, key: str, value: Any) -> None:
    """Keep what JSON can hold. Beside its place first: no other process finds half a file."""
    path = folder(kind) / key
    beside = path.with_name(f"{key}.{os.getpid()}.part")
    beside.write_bytes(zlib.compress(json.dumps(value).encode()))
    beside.replace(path)


def prune(kind: str) -> None:
    """Remove what was not used for a long time."""
    for path in folder(kind).iterdir():
        with contextlib.suppress(OSError):  # another process removed it
            if time.time() - path.stat().st_mtime > UNUSED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
