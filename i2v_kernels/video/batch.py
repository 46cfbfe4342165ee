"""What a loader yields, and what it tells about files that could not be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import shown


@dataclass
class Batch:
    """B clips of T frames. Fields can also be read as ``batch["frames"]``; ``dict(batch)`` works.

    Attributes:
        frames: ``[B, T, H, W, 3]`` uint8 RGB.
        frame_index: ``[B, T]`` int64, number of each frame in its file.
        pts: ``[B, T]`` float64, presentation time of each frame in seconds.
        label: ``[B]`` int64, label of the video that is shown; -1 if it has none.
        item: ``[B]`` int64, that video's number in ``loader.videos``.
        view: ``[B]`` int64, ``temporal * spatial_views + spatial``.
        valid: ``[B]`` bool; False for a repeat that fills up a rank's share and for a stand-in for a bad file.
            Count neither in a metric.
        path: the B files.
    """

    frames: Tensor
    frame_index: Tensor
    pts: Tensor
    label: Tensor
    item: Tensor
    view: Tensor
    valid: Tensor
    path: list[str]

    def __len__(self) -> int:
        return len(self.path)

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"a batch has {self.keys()}, not {name!r}")
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A batch with all tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A batch with all tensors in pinned memory, so that ``to(device, non_blocking=True)`` overlaps with work."""
        return self._map(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def _map(self, function: Any) -> Batch:
        tensors = {name: value for name in self.keys() if isinstance(value := self[name], Tensor)}
        return replace(self, **{name: function(value) for name, value in tensors.items()})


@dataclass
class Report:
    """The bad files met so far; ``print(report)`` shows them as a table.

    Attributes:
        bad: path -> (reason, how many times the file was asked for in vain, or used in part).
    """

    bad: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, path: str, reason: str) -> None:
        first_reason, count = self.bad.get(path, (reason, 0))
        self.bad[path] = first_reason, count + 1

    def __len__(self) -> int:
        return len(self.bad)

    def __str__(self) -> str:
        if not self.bad:
            return "no bad files"
        bad = ((shown(path), shown(why), str(count)) for path, (why, count) in self.bad.items())
        rows = [("path", "reason", "count"), *bad]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
