"""What a loader is pointed at: a folder of classes, one video, a list in a file or in memory; all become one list of videos."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from .errors import shown
from .labels import Row, number_labels, sorted_names
from .tables import SUFFIXES, named_like_a_video, plain_text, read_table


class Video(NamedTuple):
    """One video of a data set: ``label`` is -1 if it has none, ``caption`` empty likewise."""

    path: str
    label: int = -1
    caption: str = ""


class LeftOut(NamedTuple):
    """A file or folder that is not used: ``kind`` is its suffix, or "hidden", ...; ``reason`` is there where that is a loss."""

    path: str
    kind: str
    reason: str = ""


class Sources(NamedTuple):
    """The videos, the names of the classes (empty if labels were numbers or absent), and what lies beside them."""

    videos: list[Video]
    classes: tuple[str, ...] = ()
    left_out: Sequence[LeftOut] = ()


def read_sources(sources: Any) -> Sources:
    """The videos that ``sources`` names; see `ClipLoader` for what is accepted. What is left out of a folder is a warning too.

    Raises:
        FileNotFoundError: no such folder or file, or a list of which no video is there.
        ValueError: nothing in it, or a line or an entry that cannot be understood, named with its place and value.
        TypeError: an entry of a list that is neither a path nor a tuple (path, label[, caption]).
    """
    if isinstance(sources, (str, os.PathLike)):
        path = Path(os.fsdecode(sources))
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            why = f"dangling link to {shown(os.readlink(path))}" if path.is_symlink() else "no such folder or file"
            raise FileNotFoundError(f"sources: {why}: {shown(path)}")
        if named_like_a_video(path.name):
            return Sources([Video(str(path))])
        rows = read_table(path)
    elif isinstance(sources, (Mapping, Set)) or hasattr(sources, "columns"):
        raise TypeError(
            f"sources: a {type(sources).__name__} is no list of paths or (path, label); make one, as list(d.items()), "
            "sorted(s), list(zip(table['path'], table['label']))"
        )
    elif isinstance(sources, Iterable):
        rows = [_entry(source, f"sources[{i}]") for i, source in enumerate(sources)]
    else:
        raise TypeError(f"sources must be a folder, a file or a list, got {type(sources).__name__}")
    if not rows:
        raise ValueError(f"sources: no videos in {shown(sources)}")
    labels, names = number_labels(rows)
    return Sources([Video(row.path, label, row.caption) for row, label in zip(rows, labels)], names)


def walk(folder: Path, seen: Iterable[tuple[int, int]] = ()) -> tuple[list[Path], list[LeftOut]]:
    """Every file in a folder, at any depth and behind links, that is named like a video, sorted; and what else is there.

    Each folder is entered once, however many links lead to it; ``seen`` are those that are not entered at all.
    """
    found: list[Path] = []
    left: list[LeftOut] = []
    entered, folders = set(seen), [folder]
    links: list[Path] = []
    while folders or links:
        here = folders.pop() if folders else links.pop()  # under its own name rather than a link's
        files, below, behind, more = _entries(here, entered)
        found, left = found + files, left + more
        folders, links = folders + below[::-1], links + behind[::-1]
    return sorted(found), left


def told(left_out: Sequence[LeftOut], where: str) -> str:
    """One line: how many files were left out, of which kinds, and what was lost."""
    kinds = Counter(one.kind for one in left_out).most_common()
    text = f"{len(left_out)} files left out of {shown(where)}: {', '.join(f'{kind} ({count})' for kind, count in kinds)}"
    lost = [f"{shown(one.path)}: {one.reason}" for one in left_out if one.reason]
    return "; ".join([text, *lost[:5]]) + (f"; and {len(lost) - 5} more" if len(lost) > 5 else "")


def _entries(folder: Path, entered: set[tuple[int, int]]) -> tuple[list[Path], list[Path], list[Path], list[LeftOut]]:
    """Videos, folders, links to folders and the rest in a folder, in sorted order; nothing of one that was entered before."""
    files: list[Path] = []
    folders: list[Path] = []
    links: list[Path] = []
    left: list[LeftOut] = []
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            return files, folders, links, [LeftOut(str(folder), "link to a folder that is read already")]
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        return files, folders, links, [LeftOut(str(folder), "folder", f"cannot be read: {error.strerror}")]
    for entry in entries:
        path = folder / entry.name
        suffix = path.suffix.lower()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # a link to itself, for one
            left.append(LeftOut(str(path), "link", f"cannot be read: {error.strerror}"))
            continue
        if entry.name.startswith("."):
            left.append(LeftOut(str(path), "hidden"))
        elif is_folder:
            (links if entry.is_symlink() else folders).append(path)
        elif suffix and suffix not in SUFFIXES:
            left.append(LeftOut(str(path), suffix))
        elif entry.is_symlink() and not os.path.exists(path):
            left.append(LeftOut(str(path), "link", f"dangling link to {shown(os.readlink(path))}"))
        elif not suffix:
            left.append(LeftOut(str(path), "no suffix"))
        elif is_file:
            files.append(path)
        else:
            left.append(LeftOut(str(path), "no file", "neither a file nor a folder"))
    return files, folders, links, left


def _folder(root: Path) -> Sources:
    entered: set[tuple[int, int]] = set()
    beside, folders, links, left = _entries(root, entered)
    left += [LeftOut(str(path), "video beside the class folders") for path in beside]
    places = {plain_text(folder.name): folder for folder in (*folders, *links)}
    classes = sorted_names(tuple(places))
    videos: list[Video] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        files, beneath = walk(places[name], entered)
        left += beneath
        videos += [Video(str(path), label) for path in files]
        if not files:
            empty.append(name)
    if not videos:
        more = f"; {told(left, str(root))}" if left else ""
        raise ValueError(f"sources: no class folders with videos in {shown(root)}{more}")
    if left:
        warnings.warn(f"ClipLoader: {told(left, str(root))}", stacklevel=4)
    if empty:
        warnings.warn(f"ClipLoader: class folders of {shown(root)} without a video: {', '.join(empty)}", stacklevel=4)
    return Sources(videos, classes, left)


def _entry(source: Any, where: str) -> Row:
    if isinstance(source, (str, os.PathLike)):
        source = (source, None)
    if not isinstance(source, (tuple, list)) or len(source) not in (2, 3) or not isinstance(source[0], (str, os.PathLike)):
        raise TypeError(f"{where}: expected a path or (path, label[, caption]), got {source!r}")
    path, caption = os.fsdecode(source[0]), source[2] if len(source) == 3 else ""
    if not path or "\0" in path:
        raise ValueError(f"{where}: {path!r} is not a path")
    if caption is None or caption != caption:  # NaN: pandas' way to say that there is none
        caption = ""
    if not isinstance(caption, str):
        raise TypeError(f"{where}: a caption is a str, got {caption!r}")
    return Row(where, path, source[1], caption)
