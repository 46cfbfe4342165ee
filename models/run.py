"""The output folder of a run: one process at a time writes there, and only the run that it belongs to goes on in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from i2v_models import checkpoint

if TYPE_CHECKING:
    from i2v_models.config import FitConfig

_held: weakref.WeakSet[TextIO] = weakref.WeakSet()


def _close_in_child() -> None:
    """In a forked worker, which would hold the lock for as long as it outlives a killed parent."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


def hold(folder: Path, name: str = "output") -> TextIO:
    """Lock ``folder``, the setting ``name``, for this process until ``let_go``, or until it ends, however it does.

    ``ValueError`` names the run that has it; ``OSError`` says why nothing can be written there.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"{name}={str(folder)!r} cannot be written: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{name}={str(folder)!r} is in use by {who}; take another {name} or wait for its end") from None
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked ({error}); start no second run there", stacklevel=2)
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # its holder has just let go of it
        file.close()
        return hold(folder, name)
    _held.add(file)
    with contextlib.suppress(OSError):  # a full disk: who it is matters less than that it is locked
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def let_go(file: TextIO) -> None:
    if not file.closed:
        Path(file.name).unlink(missing_ok=True)
        file.close()


def total_steps(config: Any, loader: Any) -> int:
    if len(loader) == 0:
        raise ValueError("the loader has no batch: there are fewer clips than one batch needs, or none at all")
    return config.steps or max(1, int(config.epochs * len(loader) / config.accumulate))


def read_record(folder: Path) -> dict[str, Any] | None:
    """``config.json`` of a run, None if there is none; ``ValueError`` if it is something else."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {checkpoint.first_line(error)}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is not the record of a run: it holds {type(record).__name__}")
    return record


def settle(
    folder: Path, now: dict[str, Any], config: FitConfig, found: checkpoint.Checkpoint | None, loader: Any
) -> dict[str, Any]:
    """The record to write into ``folder`` before the next step of the run that is there.

    ``ValueError`` names every setting that changes the numbers and is not what it was trained with so far. What may
    change is the length of a run that has come to its end, to a longer one.
    """
    if found is None:
        return now
    before = read_record(folder)
    if before is None:
        raise ValueError(f"cannot resume {folder}: it holds checkpoints, but no config.json; take another output")
    before = {item.name: item.default for item in fields(config) if item.default is not MISSING} | before
    free = {item.name for item in fields(config) if item.metadata["resumable"]} | {"extended"}
    if "pretrained_digest" not in before:  # of a version that knew weights and videos by their place alone
        free = (free | {"pretrained_digest", "data_digest"}) - {"pretrained"}
    now = json.loads(json.dumps(now))
    steps, end = total_steps(config, loader), total_steps(SimpleNamespace(**before), loader)
    longer = found.step >= end and steps > end
    now["extended"] = before.get("extended", []) + ([end] if longer else [])
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in before.keys() | now.keys()
        if name not in (free | {"epochs", "steps"} if longer else free) and before.get(name) != now.get(name)
    ]
    if differing:
        length = f"; a run that has ended goes on with more epochs or steps, this is at step {found.step} of {end}"
        raise ValueError(
            f"cannot resume {folder}: {'; '.join(sorted(differing))}; take another output or the old value"
            f"{length if steps != end else ''}"
        )
    return now


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``, written between the last checkpoint and the end of the process."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with checkpoint.replacing(path) as temporary:
        temporary.write_text("".join(kept))


def append(path: Path, line: dict[str, Any]) -> None:
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def data_digest(loader: Any) -> str:
    """The same for the same file names and labels in the same order, wherever the files are."""
    videos = [(os.path.basename(video.path), video.label) for video in getattr(loader, "videos", ())]
    return hashlib.blake2b(repr(videos).encode(), digest_size=8).hexdigest()


def digest(state: Mapping[str, Tensor]) -> str:
    """The same for the same tensors under the same names, from whatever file they came."""
    out = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        out.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        out.update(value.flatten().view(torch.uint8).numpy())
    return out.hexdigest()
