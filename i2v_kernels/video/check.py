"""What is in a folder of videos, what would fail in training and why, and what key frames cost.

Used as ``python -m i2v_kernels.video check DIR``.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from . import dali
from .backends import decode
from .errors import VideoError
from .sampling import tsn_test
from .types import VideoIndex

CLIP = 8  # frames, in the estimates
SPACING = 16  # frames from one key frame to the next that suit training: few are decoded in vain, files stay small


@dataclass
class Found:
    """A file.

    Attributes:
        state: "ok", "part" (its first frames can be used, or what is there of a truncated file) or "bad".
        reason: why it is not "ok".
        longest_gap: frames from a key frame to the next, at most.
        decodes: frames that are decoded for a clip of 8 spread over the video.
        counted: why its frames are counted and not found by their times (see `VideoIndex`), or None.
        pixel_aspect: width of a pixel by its height.
        dali: why DALI would leave it to PyAV on a GPU, or None.
    """

    path: str
    state: str = "ok"
    reason: str = ""
    codec: str = ""
    pix_fmt: str = ""
    width: int = 0
    height: int = 0
    rotation: int = 0
    frames: int = 0
    seconds: float = 0.0
    variable_rate: bool = False
    key_frames: int = 0
    longest_gap: int = 0
    decodes: int = 0
    counted: str | None = None
    mirrored: bool = False
    stream: int = 0
    pixel_aspect: float = 1.0
    dali: str | None = None


def check_file(path: Path, index: Callable[[Path], VideoIndex], thorough: bool = False) -> Found:
    """Index a file and decode its first, middle and last frame, or ``thorough``: every frame."""
    found = Found(str(path))
    try:
        table = index(path)
    except VideoError as error:
        found.state, found.reason = "bad", error.reason
        return found
    gaps = {b - a for a, b in pairwise(table.pts)}
    keys = [*table.key_frames, table.count]
    found.codec, found.pix_fmt, found.rotation = table.codec, table.pix_fmt, table.rotation
    found.width, found.height, found.frames = table.width, table.height, table.count
    found.seconds = float((table.pts[-1] - table.pts[0]) * table.time_base)
    # whole frames in a coarse unit of time are a unit apart now and then
    found.variable_rate = bool(gaps) and max(gaps) > 1.5 * min(gaps) and max(gaps) - min(gaps) > 1
    found.key_frames, found.longest_gap = len(table.key_frames), max(b - a for a, b in pairwise(keys))
    found.decodes, found.dali = decoded_for(table.count, table.key_frames), dali.why_not(table, "cuda")
    found.counted, found.mirrored, found.stream = table.counted, table.mirrored, table.stream
    found.pixel_aspect = float(table.pixel_aspect)
    if table.damage is not None:
        found.state, found.reason = "part", table.damage
    try:
        # A file whose frames are counted was decoded whole for its index.
        wanted = range(table.count) if thorough and table.counted is None else sorted({0, table.count // 2, table.count - 1})
        for first in range(0, len(wanted), 64):
            decode(path, wanted[first : first + 64], (16, 16), index=table)
    except VideoError as error:
        found.state, found.reason = ("part" if error.decodable else "bad"), error.reason
    return found


def decoded_for(count: int, keys: Sequence[int]) -> int:
    """Frames that are decoded for a clip of `CLIP` of ``count``, where decoding can begin at ``keys``."""
    reached, total = -1, 0
    for i in tsn_test(count, CLIP):
        key = keys[bisect_right(keys, i) - 1] if keys and keys[0] <= i else 0
        total += max(i - max(key, reached + 1) + 1, 0)
        reached = i
    return total


def check_folder(
    paths: Sequence[Path],
    index: Callable[[Path], VideoIndex],
    *,
    thorough: bool = False,
    threads: int = 2,
    progress: bool = False,
) -> list[Found]:
    """`check_file` of many, in order; ``progress`` goes to stderr."""
    with ThreadPoolExecutor(threads) as pool:
        return list(_watched(pool.map(lambda path: check_file(path, index, thorough), paths), len(paths), progress))


def _watched(found: Iterable[Found], total: int, progress: bool) -> Iterable[Found]:
    begun, bad, watched = time.monotonic(), 0, sys.stderr.isatty()
    told = begun
    for done, one in enumerate(found, 1):
        bad += one.state != "ok"
        now = time.monotonic()
        if progress and (now - told > (0.2 if watched else 10.0) or done == total):  # a file gets lines, not one that grows
            told, left = now, (now - begun) / done * (total - done)
            text, end = f"{done} of {total} files, {bad} not ok, {left:.0f} s left ", "" if watched and done < total else "\n"
            print(f"\r{text}" if watched else text, end=end, file=sys.stderr, flush=True)
        yield one


def summary(found: Sequence[Found], everything: bool = False) -> str:
    """A table of kinds of files (or of every file), what would fail, and advice."""
    usable = [one for one in found if one.state != "bad"]
    lines: list[str] = []
    if everything:
        lines += _table(
            ("file", "codec", "size", "frames", "seconds", "key frames", "found by", "state"),
            *((one.path, one.codec, _size(one), *_numbers(one), one.state) for one in found),
        )
    elif usable:
        kinds = Counter((one.codec, _size(one), one.pix_fmt) for one in usable)
        rows = []
        for kind, count in kinds.most_common(20):
            same = [one for one in usable if (one.codec, _size(one), one.pix_fmt) == kind]
            seconds, frames = (statistics.median(getattr(one, name) for one in same) for name in ("seconds", "frames"))
            rows.append((str(count), *kind, f"{seconds:.1f}", f"{frames:.0f}"))
        lines += _table(("files", "codec", "size", "pixels", "median seconds", "median frames"), *rows)
        if len(kinds) > 20:
            lines.append(f"and {len(kinds) - 20} more kinds; --json names every file")
    for state, title in (("bad", "cannot be used"), ("part", "can be used in part")):
        named = [one for one in found if one.state == state]
        if named:
            lines += ["", f"{len(named)} of {len(found)} files {title}:", *_table(*((one.path, one.reason) for one in named))]
    return "\n".join([*lines, "", *advice(found)])


def advice(found: Sequence[Found]) -> list[str]:
    usable = [one for one in found if one.state != "bad"]
    ok = sum(one.state == "ok" for one in found)
    lines = [f"{ok} of {len(found)} files are good."]
    if not usable:
        return lines
    far = [one for one in usable if one.longest_gap > 2 * SPACING]
    if far:
        now = statistics.median(one.decodes for one in far)
        then = statistics.median(decoded_for(one.frames, range(0, one.frames, SPACING)) for one in far)
        lines.append(
            f"Key frames: {len(far)} files have more than {2 * SPACING} frames from one to the next. A clip of {CLIP} frames "
            f"costs {now:.0f} decoded frames (median); with a key frame every {SPACING} it would cost {then:.0f}:\n"
            f"  ffmpeg -i IN -c:v libx264 -crf 18 -g {SPACING} -keyint_min {SPACING} -sc_threshold 0 -an OUT"
        )
    else:
        lines.append(f"Key frames: at most {2 * SPACING} frames apart everywhere; nothing to gain.")
    counted = [one for one in usable if one.counted is not None]
    if counted:
        frames, cost = (statistics.median(getattr(one, name) for one in counted) for name in ("frames", "decodes"))
        why = Counter(one.counted for one in counted).most_common(5)
        lines.append(
            f"Seeking: in {len(counted)} files it is not proven to lead to the frame that is meant, so frames are counted. Its "
            f"index costs decoding the file, {frames:.0f} frames (median; --index-cache keeps it), a clip of {CLIP} another "
            f"{cost:.0f}:\n  " + "\n  ".join(f"{reason} ({number})" for reason, number in why)
        )
    if turned := sum(one.rotation != 0 or one.mirrored for one in usable):
        lines.append(f"Rotation: {turned} files are stored turned or mirrored; loaders turn them back.")
    if stretched := Counter(round(one.pixel_aspect, 3) for one in usable if one.pixel_aspect != 1):
        told = ", ".join(f"{aspect:g} times as wide as high ({number})" for aspect, number in stretched.most_common(3))
        lines.append(f"Pixels: those of {sum(stretched.values())} files are not square, {told}; frames are not stretched.")
    if variable := sum(one.variable_rate for one in usable):
        lines.append(f"Frame rate: {variable} files vary theirs; sampling='time' keeps the pace of motion.")
    reasons = Counter(one.dali for one in usable if one.dali)
    if reasons:
        told = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
        lines.append(f"On a GPU, DALI leaves {sum(reasons.values())} files to the CPU: {told}.")
    return lines


def _size(one: Found) -> str:
    return f"{one.width}x{one.height}" + (f" turned {one.rotation}" if one.rotation else "") if one.width else ""


def _numbers(one: Found) -> tuple[str, ...]:
    way = "time" if one.counted is None else "counting"
    return (str(one.frames), f"{one.seconds:.1f}", str(one.key_frames), way) if one.width else ("",) * 4


def _table(*rows: tuple[str, ...]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def write_json(path: Path, found: Sequence[Found]) -> None:
    """Beside the target first: no half-written file is left."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps([asdict(one) for one in found], indent=1))
    beside.replace(path)
