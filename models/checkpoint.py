"""Checkpoints that survive a kill at any moment, and are read without unpickling code.

A checkpoint is a folder ``checkpoint-<step>`` with ``weights.safetensors`` (the trainable part under published
names) and ``state.pt`` (optimizer, scaler, loader position; read with ``weights_only=True``). It is written beside,
synced and renamed. A checkpoint that holds NaN or Inf is neither written nor read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2v_kernels.extras import require

CHECKPOINTS = "reading and writing checkpoints"


class Checkpoint(NamedTuple):
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to, and renames it when all is on the disk.

    Where it cannot be written, as on a full disk, an ``OSError`` names ``path``; what was there before stays, nothing else.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, (OSError, RuntimeError)):
            first = error  # torch's writer fails once more while it closes, and hides what the system said
            while first.__context__ is not None and not isinstance(first, OSError):
                first = first.__context__
            raise OSError(f"{path} cannot be written: {first_line(first)}") from error
        raise


def check_writable(path: Path) -> None:
    """``OSError`` if a file ``path`` could not be written now; its folder is made."""
    if path.is_dir():
        raise OSError(f"{path} cannot be written: it is a folder")
    probe = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("{}")
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error


def remove(path: Path) -> None:
    """Delete a file or a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save(folder: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write ``folder/checkpoint-<step>`` and delete all but the newest ``keep``."""
    refuse_non_finite(step, weights, state)
    final = folder / f"checkpoint-{step:08d}"
    if final.exists():
        if _read(final) is not None:
            return final
        os.replace(final, final.with_name(f".{final.name}.damaged.tmp"))  # a folder replaces only an empty one
    for leftover in folder.glob(".checkpoint-*.tmp"):
        remove(leftover)
    with replacing(final) as temporary:
        temporary.mkdir(parents=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        try:
            require("safetensors.torch", CHECKPOINTS).save_file(weights, temporary / "weights.safetensors")
        except require("safetensors", CHECKPOINTS).SafetensorError as error:
            raise OSError(first_line(error)) from error
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
        for part in temporary.iterdir():
            _sync(part)
    for old in _checkpoints(folder)[:-keep]:
        remove(old)
    return final


def load(folder: Path) -> Checkpoint | None:
    """The newest readable checkpoint of ``folder``; None if there is none at all."""
    require("safetensors", CHECKPOINTS)  # before a run begins, not when it first saves
    found = _checkpoints(folder)
    for path in reversed(found):
        if (content := _read(path)) is not None:
            return content
    if found:
        raise OSError(f"none of the {len(found)} checkpoints in {folder} can be read")
    return None


def refuse_non_finite(step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """``FloatingPointError`` naming the first tensor of weights or state that holds NaN or Inf."""
    for name, value in [*weights.items(), *_tensors("", state)]:
        if not bool(torch.isfinite(value).all()):
            raise FloatingPointError(f"{name} is not finite after step {step}, of which no checkpoint is written")


def _tensors(name: str, content: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(f"{name}.{key}".lstrip("."), value)


def _read(path: Path) -> Checkpoint | None:
    load_file = require("safetensors.torch", CHECKPOINTS).load_file
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        found = Checkpoint(_step(path), load_file(path / "weights.safetensors"), state)
        refuse_non_finite(*found)
        return found
    except Exception as error:  # damaged bytes fail in the readers in every way there is
        warnings.warn(f"{path} cannot be read ({first_line(error)})", stacklevel=3)
        return None


def _checkpoints(folder: Path) -> list[Path]:
    named = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted((path for path in named if path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
