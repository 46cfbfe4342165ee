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
    """What is not used: ``files`` of a ``kind`` (a suffix, "hidden", ...), ``path`` the first of them; or one alone, with the
    ``reason`` that it is a loss.
    """

    path: str
    kind: str
    reason: str = ""
    files: int = 1


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
        if not os.fspath(sources):
            raise ValueError("sources: the path is empty")
        path = Path(os.fsdecode(sources))
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            why = f"dangling link to {shown(os.readlink(path))}" if path.is_symlink() else "no such folder or file"
            raise FileNotFoundError(f"sources: {why}: {shown(path)}")
        if not path.is_file():
            raise ValueError(f"sources: neither a folder nor a file: {shown(path)}")
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


def walk(folder: Path) -> tuple[list[Path], tuple[LeftOut, ...]]:
    """Every file in a folder, at any depth and behind links, that is named like a video, sorted; and what else is there."""
    left: dict[str, LeftOut] = {}
    return _walk(folder, set(), left), tuple(left.values())


def told(left_out: Sequence[LeftOut], where: str) -> str:
    """One line: how many files were left out, of which kinds, and what was lost."""
    kinds: Counter[str] = Counter()
    for one in left_out:
        kinds[one.kind] += one.files
    named = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
    lost = [f"{shown(one.path)}: {one.reason}" for one in left_out if one.reason]
    more = [f"and {len(lost) - 5} more"] if len(lost) > 5 else []
    return "; ".join([f"{kinds.total()} files left out of {shown(where)}: {named}", *lost[:5], *more])


def _walk(folder: Path, entered: set[tuple[int, int]], left: dict[str, LeftOut]) -> list[Path]:
    """Each folder is entered once, however many links lead to it."""
    found: list[Path] = []
    folders: list[Path] = [folder]
    links: list[Path] = []
    while folders or links:
        here = folders.pop() if folders else links.pop()  # under its own name rather than a link's
        files, below, behind = _entries(here, entered, left)
        found += files
        folders, links = folders + below[::-1], links + behind[::-1]
    return sorted(found)


def _entries(
    folder: Path, entered: set[tuple[int, int]], left: dict[str, LeftOut]
) -> tuple[list[Path], list[Path], list[Path]]:
    """Videos, folders and links to folders in a folder, in sorted order; nothing of one that was entered before."""
    files: list[Path] = []
    folders: list[Path] = []
    links: list[Path] = []
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            _leave(left, folder, "link to a folder that is read already")
            return files, folders, links
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        _leave(left, folder, "folder", f"cannot be read: {error.strerror}")
        return files, folders, links
    for entry in entries:
        path = folder / entry.name
        suffix = path.suffix.lower()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # a link to itself, for one
            _leave(left, path, "link", f"cannot be read: {error.strerror}")
            continue
        if entry.name.startswith("."):
            _leave(left, path, "hidden")
        elif is_folder:
            (links if entry.is_symlink() else folders).append(path)
        elif suffix and suffix not in SUFFIXES:
            _leave(left, path, suffix)
        elif entry.is_symlink() and not is_file and not os.path.exists(path):
            _leave(left, path, "link", f"dangling link to {shown(os.readlink(path))}")
        elif not suffix:
            _leave(left, path, "no suffix")
        elif is_file:
            files.append(path)
        else:
            _leave(left, path, "no file", "neither a file nor a folder")
    return files, folders, links


def _leave(left: dict[str, LeftOut], path: Path, kind: str, reason: str = "") -> None:
    """Counted by kind: of single frames beside the videos there may be millions."""
    key = f"{kind}/{path}" if reason else kind
    old = left.get(key)
    left[key] = LeftOut(str(path), kind, reason) if old is None else old._replace(files=old.files + 1)


def _folder(root: Path) -> Sources:
    entered: set[tuple[int, int]] = set()
    left: dict[str, LeftOut] = {}
    beside, folders, links = _entries(root, entered, left)
    for path in beside:
        _leave(left, path, "video beside the class folders")
    places = {plain_text(folder.name): folder for folder in (*folders, *links)}
    classes = sorted_names(tuple(places))
    videos: list[Video] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        files = _walk(places[name], set(entered), left)
        videos += [Video(str(path), label) for path in files]
        if not files:
            empty.append(shown(name))
    text = told(tuple(left.values()), str(root)) if left else ""
    if not videos:
        raise ValueError(f"sources: no class folders with videos in {shown(root)}{'; ' if text else ''}{text}")
    if left:
        warnings.warn(f"ClipLoader: {text}", stacklevel=4)
    if empty:
        warnings.warn(f"ClipLoader: class folders of {shown(root)} without a video: {', '.join(empty)}", stacklevel=4)
    return Sources(videos, classes, tuple(left.values()))


def _entry(source: Any, where: str) -> Row:
    if isinstance(source, (str, os.PathLike)):
        source = (source, None)
    if not isinstance(source, (tuple, list)) or len(source) not in (2, 3) or not isinstance(source[0], (str, os.PathLike)):
        raise TypeError(f"{where}: expected a path or (path, label[, caption]), got {source!r}")
    path, caption = str(os.fsdecode(source[0])), source[2] if len(source) == 3 else ""
    if not path or "\0" in path or not _encodable(path):
        raise ValueError(f"{where}: {path!r} is not a path")
    if caption is None or caption != caption:  # NaN: pandas' way to say that there is none
        caption = ""
    if not isinstance(caption, str):
        raise TypeError(f"{where}: a caption is a str, got {caption!r}")
    return Row(where, path, source[1], caption)


def _encodable(path: str) -> bool:
    try:
        return bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False
