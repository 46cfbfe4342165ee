"""Which frames make a clip: the sampling rules of the field, each an explicit list of frame numbers.

A sampler is called as ``sampler(count, frames, rng, clip=0, clips=1)``: choose ``frames`` of a video's ``count`` frames
for clip number ``clip`` of ``clips`` (temporal views in testing). Names that end in ``_train`` draw from ``rng``, a
``numpy.random.Generator``, and ignore ``clip``: independent draws; all others depend on nothing but their arguments. A sampler
that takes ``times`` is given the presentation time of every frame, in seconds: what it asks for at a time is the frame then on
screen, whatever the frame rate.

Videos shorter than the clip: mmaction2's default puts the first frames after the last ("loop"); a model of time should
not see such a jump, so here the last frame is repeated ("repeat_last") wherever a rule would leave the video.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import numpy as np

Rng = np.random.Generator | None
Sampler = Callable[..., list[int]]


def tsn_train(count: int, frames: int, rng: Rng, clip: int = 0, clips: int = 1) -> list[int]:
    """One random frame in each of ``frames`` equal segments: ``i * a + randint(a)``, ``a = count // frames``.

    A video of fewer than ``frames`` frames gives ``round(i * count / frames)``. TSN; mmaction2
    ``SampleFrames(clip_len=1, num_clips=frames)``.
    """
    segment = count // frames
    if segment == 0:
        return _inside(count, [round(i * count / frames) for i in range(frames)])
    jitter = _needs(rng).integers(segment, size=frames)
    return [i * segment + int(jitter[i]) for i in range(frames)]


def tsn_test(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1) -> list[int]:
    """The centre of each of ``frames`` equal segments: ``floor(i * n / T + n / (2 T))``, n frames, T segments.

    TSN; mmaction2 ``SampleFrames(num_clips=frames, test_mode=True)``. With several clips, clip k of K sits at the
    fraction ``(k + 1) / (K + 1)`` of each segment, which is the centre for K = 1.
    """
    _clip_in_range(clip, clips)
    return [count * (i * (clips + 1) + clip + 1) // (frames * (clips + 1)) for i in range(frames)]


def tsn_test_twice(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 2) -> list[int]:
    """Clip 0: the segment centres of `tsn_test`; clip 1: the segment starts ``floor(i * n / T)``.

    mmaction2's ``twice_sample`` as two temporal views; anything but ``clips=2`` is a ValueError.
    """
    if clips != 2:
        raise ValueError(f"tsn_test_twice has 2 clips (views=(2, ...)), got clips={clips}")
    _clip_in_range(clip, clips)
    return tsn_test(count, frames) if clip == 0 else [i * count // frames for i in range(frames)]


def window(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1, *, interval: int = 1) -> list[int]:
    """Frames ``interval`` apart; span ``L = (frames - 1) * interval + 1``, starts spread evenly over ``[0, n - L]``.

    One clip starts at ``(n - L) // 2``, clip k of K at ``round(k * (n - L) / (K - 1))``. The usual test sampling of
    3D networks (SlowFast; mmaction2 ``SampleFrames(clip_len=frames, frame_interval=interval, test_mode=True)``).
    """
    _clip_in_range(clip, clips)
    room = max(count - (frames - 1) * interval - 1, 0)
    start = room // 2 if clips == 1 else round(clip * room / (clips - 1))
    return _inside(count, [start + i * interval for i in range(frames)])


def window_train(count: int, frames: int, rng: Rng, clip: int = 0, clips: int = 1, *, interval: int = 1) -> list[int]:
    """Frames ``interval`` apart from a random start in ``[0, n - frames * interval]``.

    The usual training sampling of 3D networks (mmaction2 ``SampleFrames(clip_len=frames, frame_interval=interval)``).
    """
    start = int(_needs(rng).integers(max(count - frames * interval, 0) + 1))
    return _inside(count, [start + i * interval for i in range(frames)])


def dense(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1, *, sample_range: int = 64) -> list[int]:
    """``frames`` frames ``sample_range // frames`` apart, in a window of ``sample_range``; modulo n.

    Clip k of K starts at ``floor(k * (p - 1) / (K - 1))`` with ``p = max(1, 1 + n - sample_range)`` positions (10 clips
    by convention); one clip starts in the middle. TSM, I3D; mmaction2 ``DenseSampleFrames(test_mode=True)``.
    """
    _clip_in_range(clip, clips)
    last = max(count - sample_range, 0)
    start = last // 2 if clips == 1 else clip * last // (clips - 1)
    return _dense(count, frames, start, sample_range)


def dense_train(count: int, frames: int, rng: Rng, clip: int = 0, clips: int = 1, *, sample_range: int = 64) -> list[int]:
    """As `dense`, from a random start in ``[0, n - sample_range)``. mmaction2 ``DenseSampleFrames``."""
    return _dense(count, frames, int(_needs(rng).integers(max(count - sample_range, 1))), sample_range)


def uniform(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1) -> list[int]:
    """Clip k of K: ``round(s * i) + floor(s / (K + 1) * (k + 1))`` with ``s = (n - 1) / frames``.

    VideoMAE, UniFormer; mmaction2 ``UniformSample(test_mode=True)``.
    """
    _clip_in_range(clip, clips)
    segment = (count - 1) / frames
    return _inside(count, [round(segment * i) + int(segment / (clips + 1) * (clip + 1)) for i in range(frames)])


def uniform_train(count: int, frames: int, rng: Rng, clip: int = 0, clips: int = 1) -> list[int]:
    """A random frame in each ``[round(s * i), round(s * (i + 1))]``, both ends included, ``s = (n - 1) / frames``.

    VideoMAE, UniFormer; mmaction2 ``UniformSample``.
    """
    bounds = [round((count - 1) / frames * i) for i in range(frames + 1)]
    return [int(_needs(rng).integers(low, high + 1)) for low, high in pairwise(bounds)]


def linspace(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1) -> list[int]:
    """``floor(i * (n - 1) / (T - 1) + 1/2)``: from the first frame to the last, both included; only one clip.

    DALI's ``uniform_sample``; torchvision-style scripts. One frame (T = 1) is the first.
    """
    if clips != 1:
        raise ValueError(f"linspace has 1 clip, got clips={clips}")
    gaps = max(frames - 1, 1)
    return [(2 * i * (count - 1) + gaps) // (2 * gaps) for i in range(frames)]


def time(count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1, *, times: np.ndarray) -> list[int]:
    """The frames at the centres of ``frames`` equal stretches of time; with several clips as in `tsn_test`.

    At a constant frame rate that is `tsn_test`; where it varies, motion keeps its pace.
    """
    _clip_in_range(clip, clips)
    shares = (np.arange(frames) * (clips + 1) + clip + 1) / (frames * (clips + 1))
    return _at(times, times[0] + shares * _duration(times))


def time_train(count: int, frames: int, rng: Rng, clip: int = 0, clips: int = 1, *, times: np.ndarray) -> list[int]:
    """The frame at a random instant in each of ``frames`` equal stretches of time."""
    shares = (np.arange(frames) + _needs(rng).random(frames)) / frames
    return _at(times, times[0] + shares * _duration(times))


def time_window(
    count: int, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1, *, times: np.ndarray, seconds: float = 0.5
) -> list[int]:
    """The frames at instants ``seconds`` apart, starts spread evenly over what the video leaves; one clip is centred.

    torchcodec's ``clips_at_regular_timestamps(seconds_between_frames=seconds)``; "2 fps" of video question answering.
    """
    _clip_in_range(clip, clips)
    room = max(_duration(times) - frames * seconds, 0.0)
    start = times[0] + (room / 2 if clips == 1 else room * clip / (clips - 1))
    return _at(times, start + np.arange(frames) * seconds)


def time_window_train(
    count: int, frames: int, rng: Rng, clip: int = 0, clips: int = 1, *, times: np.ndarray, seconds: float = 0.5
) -> list[int]:
    """The frames at instants ``seconds`` apart from a random start; torchcodec's ``clips_at_random_timestamps``."""
    room = max(_duration(times) - frames * seconds, 0.0)
    return _at(times, times[0] + room * _needs(rng).random() + np.arange(frames) * seconds)


SAMPLERS: dict[str, Sampler] = {
    sampler.__name__: sampler
    for sampler in (
        tsn_train, tsn_test, tsn_test_twice, window, window_train, dense, dense_train, uniform, uniform_train, linspace,
        time, time_train, time_window, time_window_train,
    )
}  # fmt: skip
"""The sampling rules by name: functions of the number of frames, how many are wanted, a random generator, clip and clips."""


def get_sampler(sampling: str | Sampler) -> Sampler:
    """The sampler called ``sampling``; a function of your own passes through, e.g. ``partial(window, interval=4)``."""
    if callable(sampling):
        return sampling
    if sampling not in SAMPLERS:
        raise ValueError(f"sampling must be a function or one of {sorted(SAMPLERS)}, got {sampling!r}")
    return SAMPLERS[sampling]


def draw(sampler: Sampler, times: np.ndarray, frames: int, rng: Rng = None, clip: int = 0, clips: int = 1) -> list[int]:
    """What ``sampler`` chooses of a video whose frames have these presentation times."""
    more = {"times": times} if "times" in inspect.signature(sampler).parameters else {}
    return sampler(len(times), frames, rng, clip=clip, clips=clips, **more)


def _duration(times: np.ndarray) -> float:
    """Seconds until the last frame leaves the screen, which it does after as long as most others."""
    return float(times[-1] - times[0] + (np.median(np.diff(times)) if len(times) > 1 else 0.0))


def _at(times: np.ndarray, instants: np.ndarray) -> list[int]:
    """The frames on screen at these instants: the tolerance is for instants that are a frame's own."""
    return np.clip(np.searchsorted(times, instants + 1e-6, side="right") - 1, 0, len(times) - 1).tolist()


def _inside(count: int, indices: list[int]) -> list[int]:
    return [min(i, count - 1) for i in indices]


def _dense(count: int, frames: int, start: int, sample_range: int) -> list[int]:
    step = max(sample_range // frames, 1)
    return [(start + i * step) % count for i in range(frames)]


def _clip_in_range(clip: int, clips: int) -> None:
    if not 0 <= clip < clips:
        raise ValueError(f"clip must be in 0..clips - 1, got clip={clip}, clips={clips}")


def _needs(rng: Rng) -> np.random.Generator:
    if rng is None:
        raise ValueError("a training sampler needs rng, a numpy.random.Generator, got None")
    return rng
