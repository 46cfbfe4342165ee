"""What loaders yield, and what of it counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Clips(NamedTuple):
    """The valid clips of a batch of ``epoch``: ``frames [B, T, H, W, 3]``, ``label [B]``; number and path of each one's video,
    where the loader tells them.
    """

    frames: Tensor
    label: Tensor
    item: Tensor | None
    path: Sequence[str] | None
    epoch: int


def stream(loader: Any, epoch: int) -> Iterator[tuple[int, Any]]:
    """``(epoch, batch)`` without end. ``epoch`` is continued where the loader stands, the later ones start afresh."""
    empty = 0
    while empty < 2:  # the rest of an epoch may be empty, a whole one not
        empty += 1
        for batch in loader:
            empty = 0
            yield epoch, batch
        epoch += 1
        loader.set_epoch(epoch)
    raise ValueError("the loader gave no batch in a whole epoch; its report() names the files that cannot be read")


def valid_part(batch: Any, epoch: int) -> Clips:
    """A batch without repeats and stand-ins for bad videos."""
    label, item = torch.as_tensor(batch.label), getattr(batch, "item", None)
    clips = Clips(batch.frames, label, None if item is None else torch.as_tensor(item), getattr(batch, "path", None), epoch)
    valid = getattr(batch, "valid", None)
    if valid is None or bool(torch.as_tensor(valid).all()):
        return clips
    kept = torch.as_tensor(valid).nonzero().flatten()
    return Clips(
        clips.frames[kept],
        label[kept],
        None if clips.item is None else clips.item[kept],
        None if clips.path is None else [clips.path[row] for row in kept.tolist()],
        epoch,
    )


def bad_videos(loader: Any) -> dict[str, str]:
    """Path and reason of every video that could not be read so far."""
    return {path: reason for path, (reason, _) in loader.report().bad.items()}


def check_labels(label: Tensor, path: Sequence[str] | None, classes: int) -> None:
    """``ValueError`` naming the first clip whose label is no class of the model."""
    wrong = ((label < 0) | (label >= classes)).nonzero().flatten().tolist()
    if wrong:
        where = f" of {path[wrong[0]]}" if path is not None else ""
        raise ValueError(f"label {int(label[wrong[0]])}{where} is none of the model's {classes} classes, 0 to {classes - 1}")
