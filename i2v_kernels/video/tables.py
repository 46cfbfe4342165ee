"""Lists of videos in text files: CSV with any common delimiter, header and encoding, and lines of ``path label``."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from .errors import shown
from .labels import Row

# What a column may be called, without regard to case, spaces, "_", "-" and "."; of two, the one in the earlier line is taken.
PATHS = (
    "path paths file files filename filepath fname videopath videofile videofilename videofilepath clippath clipfile "
    "clipfilename fullpath relpath relativepath abspath source src uri mp4 avi",
    "video videos clip clips vid videoname clipname",
    "videoid clipid id name",
)
LABELS = (
    "label labels class classes target targets y category categories action activity gt groundtruth tag classlabel actionlabel "
    "targetlabel videolabel actionclass activityclass",
    "labelname classname categoryname actionname activityname",
    "labelid labelidx labelindex classid classidx classindex targetid categoryid actionid activityid",
)
CAPTIONS = (
    "caption captions text texts sentence sentences description descriptions",
    "title narration transcript query prompt",
)
_ROLES = {"path": PATHS, "label": LABELS, "caption": CAPTIONS}
_KNOWN = {name: (role, rank) for role, ranks in _ROLES.items() for rank, names in enumerate(ranks) for name in names.split()}

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD = 1 << 16  # bytes that tell text from anything else
_BLANK = " "
_HOW = "a line is path,label,caption (or path label), or the first one names these columns"

# fmt: off
SUFFIXES = frozenset({
    ".264", ".265", ".3g2", ".3gp", ".amv", ".asf", ".avc", ".avi", ".avs2", ".avs3", ".bik", ".cavs", ".dav", ".dif",
    ".divx", ".drc", ".dv", ".evo", ".f4v", ".flv", ".gif", ".gxf", ".h261", ".h263", ".h264", ".h265", ".hevc", ".ivf",
    ".ivr", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4s", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mov",
    ".mp2v", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpeg4", ".mpg", ".mpv", ".mts", ".mxf", ".nsv", ".nut", ".obu", ".ogm",
    ".ogv", ".ogx", ".qt", ".rm", ".rmvb", ".tod", ".tp", ".trp", ".ts", ".vc1", ".vob", ".webm", ".wmv", ".wtv", ".xvid",
    ".y4m",
})
# fmt: on


def named_like_a_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def read_table(file: Path) -> list[Row]:
    """The rows of a list; paths are relative to its folder.

    Raises:
        ValueError: a line that cannot be understood, by number and text. FileNotFoundError: none of its videos is there.
    """
    rows = list(_rows(file, _read(file)))
    if rows and not any(os.path.exists(row.path) for row in rows):
        others = f"; nor is any other of its {len(rows)} videos there" if len(rows) > 1 else ""
        raise FileNotFoundError(f"{rows[0].where}: no such file: {shown(rows[0].path)}{others}")
    return rows


def _read(file: Path) -> str:
    with file.open("rb") as opened:
        data = opened.read(_HEAD)
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
        if encoding is None and b"\0" in data:
            even, odd, some = data[0::2].count(0), data[1::2].count(0), len(data) / 16  # half the bytes of plain text
            encoding = "utf-16-le" if odd > some + 8 * even else "utf-16-be" if even > some + 8 * odd else None
            if encoding is None:
                line = data[: data.index(0)].count(b"\n") + 1
                raise ValueError(f"{shown(file)}, line {line}: a byte of 0, so it is no list; nor is it named like a video")
        data += opened.read()
    try:
        text = data.decode(encoding or "utf-8", "surrogateescape" if encoding in (None, "utf-8-sig") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(file)}: not {error.encoding}, as it begins: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{shown(file)}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: a byte of 0")
    return text


def plain_text(text: str) -> str:
    """Text with bytes that are not UTF-8 (as `os.fsdecode` keeps them) read as Windows-1252, or else as Latin-1."""
    if text.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    data = text.encode("utf-8", "surrogateescape")
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _rows(file: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    name, folder = shown(file), file.parent
    delimiter = _delimiter(name, text, folder)
    lines = _lines(name, text, delimiter, folder)
    number, cells = next(lines)
    columns = _columns(f"{name}, line {number}", cells, folder)
    if columns is None:
        width, columns = 3, {"path": 0, "label": 1, "caption": 2}
        lines = chain([(number, cells)], lines)
    else:
        width = len(cells)
        if unused := [cell for i, cell in enumerate(cells) if i not in columns.values() and cell]:
            no_label = "" if "label" in columns else "; none is called label, class or the like"
            warnings.warn(f"{name}: columns that are not used: {shown(', '.join(unused))}{no_label}", stacklevel=5)
    told = False
    for number, cells in lines:
        where = f"{name}, line {number}"
        if not told and (strange := [plain_text(cell) for cell in cells if plain_text(cell) != cell]):
            told = True
            warnings.warn(f"{where}: not UTF-8, read as Windows-1252: {strange[0]!r}", stacklevel=5)
        yield _row(where, folder, cells, columns, width, delimiter)


def _row(where: str, folder: Path, cells: list[str], columns: dict[str, int], width: int, delimiter: str) -> Row:
    got = shown(delimiter.join(cells))
    while len(cells) > width and not cells[-1]:
        cells = cells[:-1]
    if len(cells) > width:
        raise ValueError(f"{where}: {len(cells)} columns where {width} are expected, in {got!r}")
    found = {role: cells[i] if i < len(cells) else "" for role, i in columns.items()}
    if not found["path"]:
        raise ValueError(f"{where}: no path, in {got!r}")
    path = _place(folder, found["path"])
    if not named_like_a_video(path) and not os.path.isfile(path):
        raise ValueError(f"{where}: {shown(found['path'])!r} is no file, nor named like a video, in {got!r}; {_HOW}")
    return Row(where, path, plain_text(found.get("label", "")), plain_text(found.get("caption", "")))


def _place(folder: Path, text: str) -> str:
    """The file that is meant: names of files hold the bytes of the list, or what these mean."""
    as_it_is, plain = str(folder / text), str(folder / plain_text(text))
    return as_it_is if as_it_is == plain or os.path.exists(as_it_is) else plain


def _is_video(folder: Path, text: str) -> bool:
    return named_like_a_video(text) or os.path.isfile(folder / text)


def _lines(name: str, text: str, delimiter: str, folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line that has any; a quoted cell may go on in the next line."""
    stream = io.StringIO(text, newline="")
    if delimiter == _BLANK:
        for number, line in enumerate(stream, 1):
            path, *label = line.strip().rsplit(None, 1) or [""]  # a path may hold blanks too
            if path:
                yield number, [path, *label] if label and not _is_video(folder, line.strip()) else [line.strip()]
        return
    reader, number = csv.reader(stream, delimiter=delimiter, strict=True), 1
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}, line {number}: {error}; a cell that holds quotes or {delimiter!r} must be quoted") from None


def _delimiter(name: str, text: str, folder: Path) -> str:
    """The one that makes of the first line a header, or cells of which the first is a video; a blank for ``path label``."""
    trouble: ValueError | None = None
    for delimiter in "\t;,|":
        try:
            _, cells = next(_lines(name, text, delimiter, folder))
        except ValueError as error:
            trouble = trouble or error
            continue
        if _is_header(cells, folder) or (_is_video(folder, cells[0]) and (len(cells) > 1 or '"' in text)):
            return delimiter
    number, cells = next(_lines(name, text, _BLANK, folder))
    if trouble is None and not os.path.isfile(folder / cells[0]) and re.search(r"[\t;,|]", cells[0]):
        trouble = _neither(f"{name}, line {number}", cells)
    if trouble is not None:
        raise trouble
    return _BLANK


def _neither(where: str, cells: Sequence[str]) -> ValueError:
    text = shown(" ".join(cells))
    return ValueError(f"{where}: {text!r} neither begins with a video nor calls a column path, video or the like; {_HOW}")


def _roles(cells: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """What the cells of a header stand for: role -> (rank, column) of each that can be it."""
    found: dict[str, list[tuple[int, int]]] = {}
    for i, cell in enumerate(cells):
        role, rank = _KNOWN.get(re.sub(r"[\s_.#-]+", "", cell.casefold()), ("", 0))
        if role:
            found.setdefault(role, []).append((rank, i))
    return found


def _is_header(cells: Sequence[str], folder: Path) -> bool:
    videos = any(named_like_a_video(cell) for cell in cells) or os.path.isfile(folder / cells[0])
    return "path" in _roles(cells) and not videos


def _columns(where: str, cells: list[str], folder: Path) -> dict[str, int] | None:
    """Where path, label and caption are, if this line is a header; None if it begins with a video."""
    if not _is_header(cells, folder):
        if _is_video(folder, cells[0]):
            return None
        raise _neither(where, cells)
    columns: dict[str, int] = {}
    for role, found in _roles(cells).items():
        best = [i for rank, i in found if rank == min(found)[0]]
        if len(best) > 1:
            told = ", ".join(repr(cells[i]) for i in best)
            raise ValueError(f"{where}: which column is the {role}: {told}? Call the others otherwise")
        columns[role] = best[0]
    return columns
