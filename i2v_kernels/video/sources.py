"""What a loader is pointed at: a folder of classes, a CSV file or a list, all turned into one list of videos."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".h264", ".hevc", ".m4v", ".mkv", ".mov"}
    | {".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"}
)


class Video(NamedTuple):
    """One video of a data set: ``label`` is -1 if it has none, ``caption`` empty likewise."""

    path: str
    label: int = -1
    caption: str = ""


def read_sources(sources: Any) -> tuple[list[Video], tuple[str, ...]]:
    """The videos and the class names (empty if labels were numbers or absent); see `ClipLoader` for what is accepted.

    Raises:
        FileNotFoundError: no such folder or CSV file.
        ValueError: nothing in it, or a line that cannot be understood.
        TypeError: an entry of a list that is neither a path nor a tuple (path, label[, caption]).
    """
    if isinstance(sources, (str, os.PathLike)):
        path = Path(sources)
        if path.is_dir():
            return _folder(path)
        if not path.is_file():
            raise FileNotFoundError(f"sources: no such folder or CSV file: {path}")
        rows = _csv(path)
    elif isinstance(sources, Iterable):
        rows = [_entry(source) for source in sources]
    else:
        raise TypeError(f"sources must be a folder, a CSV file or a list, got {type(sources).__name__}")
    if not rows:
        raise ValueError(f"sources: no videos in {sources!r}")
    return _label(rows)


def files_below(folder: Path) -> list[Path]:
    """Every file in a folder, at any depth, that is named like a video; in sorted order."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    return [path for path in found if path.is_file()]


def _folder(root: Path) -> tuple[list[Video], tuple[str, ...]]:
    classes = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] != "."))
    videos = [
        Video(str(path), label)
        for label, name in enumerate(classes)
        for path in files_below(root / name)
    ]
    if not videos:
        raise ValueError(f"sources: no class folders with videos in {root}")
    return videos, classes


def _csv(path: Path) -> list[tuple[str, Any, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if any(cell.strip() for cell in row)]
    columns = ["path", "label", "caption"]
    if lines and "path" in (header := [cell.strip().lower() for cell in lines[0][1]]):
        columns, lines = header, lines[1:]
    rows = []
    for number, row in lines:
        cells = dict(zip(columns, (cell.strip() for cell in row)))
        if len(row) > len(columns) or not cells.get("path"):
            raise ValueError(f"{path}, line {number}: expected {','.join(columns)}, got {','.join(row)!r}")
        rows.append((str(path.parent / cells["path"]), cells.get("label", ""), cells.get("caption", "")))
    return rows


def _entry(source: Any) -> tuple[str, Any, str]:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source), "", ""
    if not isinstance(source, (tuple, list)) or len(source) not in (2, 3):
        raise TypeError(f"sources: expected a path or (path, label[, caption]), got {source!r}")
    path, label, *caption = source
    return os.fspath(path), label, *(caption or [""])


def _label(rows: list[tuple[str, Any, str]]) -> tuple[list[Video], tuple[str, ...]]:
    labels = ["" if label is None else str(label) for _, label, _ in rows]
    names = sorted({label for label in labels if label and not label.lstrip("-").isdecimal()})
    numbers = sorted({label for label in labels if label} - set(names))
    if names and numbers:
        raise ValueError(f"sources: labels must be all numbers or all names, got {numbers[0]!r} and {names[0]!r}")
    number = {name: i for i, name in enumerate(names)} | {label: int(label) for label in numbers} | {"": -1}
    videos = [Video(path, number[label], caption) for (path, _, caption), label in zip(rows, labels)]
    return videos, tuple(names)
