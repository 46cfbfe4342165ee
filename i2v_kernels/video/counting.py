"""Files whose packets prove nothing: decoded once from first to last, their frames are those that come, in that order.

A clip is decoded in the same way and counted. To begin in the middle of a long file, the same is tried beforehand: from a key
frame on, the decoder must give the pictures that it gave before, each of them, up to the next such place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any, NamedTuple
from zlib import crc32

from .errors import VideoError
from .opening import NotExactError, decoded, failures, opened, packets_from, packets_of, reason_of
from .types import Mark, StrPath

SPACING = 256  # frames at least from one proven place to the next
_NEAR = 4  # packets: what is wrong so near to a join is of the join
_BACK = 5  # frames: by as many do the guessed times of MPEG-1 go back now and then


class Fed(NamedTuple):
    """A packet given to the decoder.

    Attributes:
        pts, dts: when it is shown, and when decoded, in units of the stream; None if the file does not say.
        key, crc: whether it is marked as a key frame, and if so what its bytes sum up to.
        clock: how often the clock went back before it.
        part: how often the stream was broken off before it: by the clock, or by packets that are lost.
    """

    pts: int | None
    dts: int | None
    key: bool
    crc: int
    clock: int
    part: int
    gap: bool


class _Labels:
    """Gives the packets to the decoder with their number in place of their time, so that each frame tells from which it is."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.container, self.stream = container, stream
        self.fed: list[Fed] = []
        self.first: Any = None  # frame
        self.frames: list[tuple[int, int]] = []  # (number of its packet, what its picture sums up to)
        self.errors: list[tuple[int, int, str]] = []  # number of the packet, frames before, what is wrong with it

    def run(self, sums: bool) -> None:
        """Decodes everything; raises what is wrong with the file, but for its pictures."""
        for frame in decoded(self._packets(), self.stream, self._trouble):
            self.first = self.first or frame
            number = self.frames[-1][0] if self.frames and frame.pts is None else frame.pts or 0
            self.frames.append((number, _sum(frame) if sums else 0))

    def _packets(self) -> Iterator[Any]:
        clock, part, last, broken = 0, 0, None, False
        second = 1 / self.stream.time_base
        back = _BACK * second / (self.stream.average_rate or 25)
        for number, packet in enumerate(packets_of(self.container, self.stream)):
            if last is not None and packet.dts is not None:
                clock += packet.dts < last - back
                part += not last - back <= packet.dts <= last + second or broken
            last = last if packet.dts is None else packet.dts
            broken = packet.is_corrupt
            key = packet.is_keyframe
            self.fed.append(Fed(packet.pts, packet.dts, key, crc32(memoryview(packet)) if key else 0, clock, part, broken))
            packet.pts = number
            yield packet

    def _trouble(self, error: Exception) -> None:
        self.errors.append((len(self.fed) - 1, len(self.frames), reason_of(error)))

    def end(self) -> tuple[int, str] | None:
        """Of the part that is used, frames and why, if a packet is damaged.

        What cannot be decoded before the first frame of a part is no damage, for it begins between key frames; nor is what lies
        between two parts, as headers do.
        """
        for number, before, reason in self.errors:
            part = self.fed[number].part
            begun = before and self.fed[self.frames[before - 1][0]].part == part
            if begun and part == self.fed[min(number + _NEAR, len(self.fed) - 1)].part:
                return before, reason
        return None


def count(path: StrPath, container: Any, stream: Any, why: str) -> tuple[Any, dict[str, Any]]:
    """A frame, and what the index says of all; ``why`` they have to be counted."""
    labels, trouble = _Labels(container, stream), ""
    try:
        labels.run(sums=_expected(stream) >= 2 * SPACING)
    except failures() as error:  # of the file, not of the decoder
        trouble = f": {reason_of(error)}"
    fed, frames = labels.fed, labels.frames
    if not frames:
        raise VideoError(path, f"no frame decodes{trouble}")
    damage = f"damaged after {len(frames)} frames{trouble}" if trouble else None
    if (end := labels.end()) is not None:
        damage = f"only the first {end[0]} of {max(len(fed), len(frames))} frames decode: {end[1]}"
        frames = frames[: end[0]]
    # At a join the counters of a transport stream do not go on either, and the last packets before it are marked.
    gaps = sum(packet.gap and packet.clock == fed[min(i + _NEAR, len(fed) - 1)].clock for i, packet in enumerate(fed))
    if gaps and damage is None:
        damage = f"{gaps} packet{'s are' if gaps > 1 else ' is'} marked as damaged"
    turns = fed[frames[-1][0]].clock
    if turns:
        why += f", and its clock goes back {turns} time{'s' * (turns > 1)}: times go on from there as if it did not"
    times, time_base = _times(stream, [fed[number] for number, _ in frames])
    places = {0: Mark(0, 0)}
    if frames[0][1] and len(frames) >= 2 * SPACING:
        places |= _proven(path, stream.index, frames, fed)
    return labels.first, {
        "count": len(frames),
        "pts": times,
        "key_frames": tuple(places),
        "marks": tuple(places.values()),
        "time_base": time_base,
        "counted": why,
        "damage": damage,
    }


def _times(stream: Any, packets: Sequence[Fed]) -> tuple[tuple[int, ...], Fraction]:
    """Ascending times of frames, from those of their packets, and their unit."""
    frame = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
    if all(packet.pts is None and packet.dts is None for packet in packets):
        return tuple(range(len(packets))), frame
    runs = [_told(list(run)) for _, run in groupby(sorted(packets, key=_clock), key=_clock)]
    steps = Counter(b - a for run in runs for a, b in pairwise(sorted(time for time in run if time is not None)) if a < b)
    step = steps.most_common(1)[0][0] if steps else max(1, round(frame / stream.time_base))
    times: list[int] = []
    for run in runs:
        filled = sorted(_filled(run, step))
        shift = times[-1] + step - filled[0] if times else 0
        for time in filled:
            time += shift
            times.append(time if not times or time > times[-1] else times[-1] + max(1, step // 2))
    return tuple(times), stream.time_base


def _clock(packet: Fed) -> int:
    return packet.clock


def _told(packets: list[Fed]) -> list[int | None]:
    """The times of display; where these are made up, as those of AVI files are, frames carry one another's, or share one."""
    shown, decoded_at = [packet.pts for packet in packets], [packet.dts for packet in packets]
    distinct = len(set(decoded_at)) == len(decoded_at) and None not in decoded_at
    return decoded_at if distinct and (None in shown or len(set(shown)) < len(shown)) else shown


def _filled(times: list[int | None], step: int) -> list[int]:
    """Those that are missing lie ``step`` behind the one before, or before the one behind."""
    known = [i for i, time in enumerate(times) if time is not None]
    if not known:
        return [step * i for i in range(len(times))]
    first = times[known[0]]
    assert first is not None
    filled = [first - step * (known[0] - i) for i in range(known[0])]
    for time in times[known[0] :]:
        filled.append(filled[-1] + step if time is None else time)
    return filled


def _proven(path: StrPath, stream: int, frames: list[tuple[int, int]], fed: list[Fed]) -> dict[int, Mark]:
    """The frames from which decoding gives what it gave from the start, up to the next of them; and how to begin there."""
    places: list[tuple[int, int]] = []  # frame, packet
    for i, (number, _) in enumerate(frames):
        if i >= (places[-1][0] if places else 0) + SPACING and fed[number].key and fed[number].dts is not None:
            places.append((i, number))
    found, end = {}, len(frames)
    for i, number in reversed(places):
        packet = fed[number]
        try:
            passed = _gives(path, stream, Mark(packet.dts or 0, packet.crc), [total for _, total in frames[i:end]])
        except VideoError:
            passed = None
        if passed is not None:
            found[i] = Mark(packet.dts or 0, packet.crc, passed)
            end = i
    return dict(sorted(found.items()))


def _gives(path: StrPath, number: int, mark: Mark, wanted: list[int]) -> int | None:
    """How many frames to pass over from a mark on to those wanted; None if they do not come so."""
    passed, place = 0, 0
    with opened(path, number) as (container, stream):
        try:
            for frame in decoded(packets_from(container, stream, mark), stream):
                if _sum(frame) == wanted[place]:
                    place += 1
                    if place == len(wanted):
                        return passed
                elif place or passed > 64:
                    return None
                else:
                    passed += 1
        except NotExactError:
            return None
    return None


def _sum(frame: Any) -> int:
    """What the pixels sum up to, without what lies between their lines."""
    try:
        return crc32(frame.to_ndarray().data)
    except ValueError:
        return crc32(frame.to_ndarray(format="rgb24").data)


def _expected(stream: Any) -> float:
    """Frames, by what the file says; infinite if it does not."""
    if stream.frames:
        return stream.frames
    rate = stream.average_rate or stream.guessed_rate
    return float(stream.duration * stream.time_base * rate) if stream.duration and rate else float("inf")
