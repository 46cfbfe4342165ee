"""Checkpoints that survive a kill at any moment, and are read without unpickling code.

A checkpoint is a folder ``checkpoint-<step>`` with ``weights.safetensors`` (the trainable part under published
names) and ``state.pt`` (optimizer, scaler, loader position; read with ``weights_only=True``). It is written beside,
synced and renamed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class Checkpoint(NamedTuple):
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to, and renames it when all is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save(folder: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``folder/checkpoint-<step>`` and delete all but the newest ``keep``."""
    final = folder / f"checkpoint-{step:08d}"
    if final.exists():
        return final
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    with replacing(final) as temporary:
        temporary.mkdir(parents=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(weights, temporary / "weights.safetensors")
        torch.save(state, temporary / "state.pt")
        for part in temporary.iterdir():
            _sync(part)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of ``folder``; None if there is none at all."""
    found = _checkpoints(folder)
    for path in reversed(found):
        if (content := _read(path)) is not None:
            return content
    if found:
        raise OSError(f"none of the {len(found)} checkpoints in {folder} can be read")
    return None


def _read(path: Path) -> Checkpoint | None:
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(int(path.name.split("-")[1]), load_file(path / "weights.safetensors"), state)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        warnings.warn(f"{path} cannot be read ({error})", stacklevel=3)
        return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
