"""Samplers against the formulas of the code that they are named after, written out with numpy."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from i2v_kernels.video import SAMPLERS, get_sampler
from i2v_kernels.video.sampling import dense, draw, time_window, window

COUNTS = [1, 2, 3, 7, 8, 9, 31, 64, 65, 250, 1001]
TRAIN = sorted(name for name in SAMPLERS if name.endswith("_train"))
TEST = sorted(set(SAMPLERS) - set(TRAIN))


def choose(name: str, count: int, frames: int, rng=None, clip: int = 0, clips: int = 1) -> list[int]:
    """At 25 frames a second."""
    return draw(SAMPLERS[name], np.arange(count) / 25, frames, rng, clip, clips)


def clips_of(name: str) -> int:
    return {"tsn_test_twice": 2, "linspace": 1}.get(name, 3)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_stays_in_the_video(name: str, count: int) -> None:
    for frames in (1, 2, 8, 17, 100):
        for clip in range(clips_of(name)):
            found = choose(name, count, frames, np.random.default_rng(5), clip=clip, clips=clips_of(name))
            assert len(found) == frames
            assert all(type(i) is int and 0 <= i < count for i in found)
            assert found == choose(name, count, frames, np.random.default_rng(5), clip=clip, clips=clips_of(name))
            if not name.startswith("dense"):
                assert found == sorted(found)


@pytest.mark.parametrize("name", TRAIN)
def test_training_samplers_draw(name: str) -> None:
    rng = np.random.default_rng(0)
    assert len({tuple(choose(name, 250, 8, rng)) for _ in range(20)}) > 15
    with pytest.raises(ValueError, match="needs rng"):
        choose(name, 250, 8, None)


@pytest.mark.parametrize("name", TEST)
def test_test_samplers_do_not(name: str) -> None:
    clips = clips_of(name)
    views = {tuple(choose(name, 250, 8, clip=clip, clips=clips)) for clip in range(clips)}
    assert len(views) == clips
    for clip in (-1, clips):
        with pytest.raises(ValueError, match="clip"):
            choose(name, 250, 8, clip=clip, clips=clips + (name == "linspace"))


@pytest.mark.parametrize("n", [8, 9, 64, 250, 1001])
def test_formulas(n: int) -> None:
    t = 8
    segments = np.arange(t)
    assert SAMPLERS["tsn_test"](n, t) == np.floor(segments * n / t + n / (2 * t)).tolist()
    assert SAMPLERS["tsn_test_twice"](n, t, clip=0) == SAMPLERS["tsn_test"](n, t)
    assert SAMPLERS["tsn_test_twice"](n, t, clip=1) == np.floor(segments * n / t).tolist()
    assert SAMPLERS["linspace"](n, t) == np.floor(np.linspace(0, n - 1, t) + 0.5).tolist()
    size = (n - 1) / t
    for k in range(3):
        starts = [int(np.round(size * i)) for i in segments]
        assert SAMPLERS["uniform"](n, t, clip=k, clips=3) == [s + int(size / 4 * (k + 1)) for s in starts]


def test_tsn_train_takes_one_frame_per_segment() -> None:
    draws = np.array([SAMPLERS["tsn_train"](83, 8, np.random.default_rng(i)) for i in range(300)])
    for i in range(8):
        assert set(draws[:, i]) == set(range(10 * i, 10 * i + 10))
    assert SAMPLERS["tsn_train"](3, 8, np.random.default_rng(0)) == [0, 0, 1, 1, 2, 2, 2, 2]


def test_uniform_train_keeps_to_its_bounds() -> None:
    draws = np.array([SAMPLERS["uniform_train"](81, 8, np.random.default_rng(i)) for i in range(400)])
    for i in range(8):
        assert set(draws[:, i]) == set(range(10 * i, 10 * i + 11))


def test_window() -> None:
    assert window(100, 8, interval=4) == list(range(35, 64, 4))
    assert [window(100, 8, clip=k, clips=3, interval=4)[0] for k in range(3)] == [0, 36, 71]
    assert window(5, 8) == [0, 1, 2, 3, 4, 4, 4, 4]
    starts = set()
    for i in range(300):
        found = SAMPLERS["window_train"](40, 8, np.random.default_rng(i), interval=4)
        assert {b - a for a, b in pairwise(found)} == {4}
        starts.add(found[0])
    assert starts == set(range(9))


def test_dense() -> None:
    starts = np.linspace(0, 250 - 64, 10, dtype=int)
    for k in range(10):
        assert dense(250, 8, clip=k, clips=10) == [int(starts[k]) + 8 * i for i in range(8)]
    assert dense(20, 8) == [8 * i % 20 for i in range(8)]
    assert {SAMPLERS["dense_train"](70, 8, np.random.default_rng(i))[0] for i in range(100)} == set(range(6))


def test_names() -> None:
    mine = partial(window, interval=4)
    assert get_sampler(mine) is mine
    with pytest.raises(ValueError, match="tsn_test"):
        get_sampler("tsm")


def test_by_time() -> None:
    # at a constant rate the centres of stretches of time are those of segments
    for count in (8, 31, 64, 250):
        for clip, clips in ((0, 1), (1, 3)):
            assert choose("time", count, 8, None, clip, clips) == SAMPLERS["tsn_test"](count, 8, clip=clip, clips=clips)
    # one second of 20 frames, then nine of one frame each: nine tenths of the time, nine tenths of the choice
    times = np.array([i / 20 for i in range(20)] + [1.0 + i for i in range(9)])
    found = draw(SAMPLERS["time"], times, 10)
    assert sum(i < 20 for i in found) == 1
    assert [times[i] for i in draw(partial(time_window, seconds=1.0), times, 4, None, 0, 2)] == [0, 1, 2, 3]
    assert draw(partial(time_window, seconds=0.05), times, 4, None, 0, 2) == [0, 1, 2, 3]
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second = draw(SAMPLERS["time_train"], times, 2, rng)
        middle = times[0] + (times[-1] + 0.05 - times[0]) / 2
        assert times[first] < middle and times[second] > middle - 1
        steps = np.diff(times[draw(SAMPLERS["time_window_train"], times, 4, rng)])
        assert (np.abs(steps - 0.5) < 1).all()
