"""Moving digits: a video set in which every clip also exists backwards, under another name.

Handwritten digits of scikit-learn move in one of eight ways, four and their reversals. Each test clip comes with its own
time reversal, frame for frame, so whoever looks at the frames without their order is wrong on at least one of the two:
half is the most that an order-blind model can reach, and an eighth is chance.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from i2v_kernels.extras import require
from i2v_kernels.video import write_video
from i2v_models.checkpoint import replacing, write_json

SIZE = 32  # pixels, height and width of a frame
FRAMES = 8
FPS = 8
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# A motion, its reversal, and the direction in which the first of them moves; growing has none.
PAIRS = (
    ("right", "left", (1.0, 0.0)),
    ("up", "down", (0.0, -1.0)),
    ("up_right", "down_left", (0.85, -0.85)),
    ("growing", "shrinking", (0.0, 0.0)),
)
MOTIONS = tuple(sorted(name for forward, backward, _ in PAIRS for name in (forward, backward)))


@dataclass(frozen=True)
class DataConfig:
    """``train`` and ``test`` clips; both are multiples of 8, a clip and its reversal of each of the four kinds."""

    train: int = 4096
    test: int = 512
    seed: int = 0


def caption(digit: str, motion: str) -> str:
    verb = motion.replace("_", " ")
    return f"{digit} {verb}" if motion in PAIRS[3] else f"{digit} moving {verb}"


def load(split: str) -> tuple[Tensor, Tensor]:
    """Digits ``[N, 8, 8]`` in 0..1 and their values ``[N]``; every fourth is for testing, the others for training."""
    found = require("sklearn.datasets", "i2v_models.demo").load_digits()
    chosen = (torch.arange(len(found.target)) % 4 == 0) == (split == "test")
    return torch.tensor(found.images, dtype=torch.float32)[chosen] / 16, torch.tensor(found.target)[chosen]


def render(digits: Tensor, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Draw ``digits [N, 8, 8]``, each ``size [N]`` pixels wide, with their centres at ``x, y [N]``: ``[N, H, W, 3]`` uint8."""
    theta = torch.zeros(len(digits), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = SIZE / size
    theta[:, 0, 2], theta[:, 1, 2] = (SIZE - 2 * x) / size, (SIZE - 2 * y) / size
    grid = F.affine_grid(theta, [len(digits), 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(digits[:, None], grid, align_corners=False)[:, 0]
    return (255 * ink).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()


def uniform(count: int, random: torch.Generator) -> Callable[[float, float], Tensor]:
    """``draw(low, high)`` gives ``count`` numbers."""
    return lambda low, high: low + (high - low) * torch.rand(count, generator=random)


def trajectories(count: int, direction: tuple[float, float], random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and size, each ``[count, FRAMES]``. All motions have the same centres of their paths, so that where a digit
    is on average tells nothing either.
    """
    draw = uniform(count, random)
    time = torch.linspace(-0.5, 0.5, FRAMES)
    x, y = (draw(SIZE / 2 - 3, SIZE / 2 + 3)[:, None].expand(-1, FRAMES) for _ in range(2))
    travel, size = draw(11, 14)[:, None] * time, draw(12, 15)[:, None].expand(-1, FRAMES)
    if direction == (0.0, 0.0):
        return x, y, size + 0.8 * travel
    return x + direction[0] * travel, y + direction[1] * travel, size


def clips(split: str, count: int, seed: int) -> list[tuple[str, int, Tensor]]:
    """``count`` clips as (motion, digit, frames ``[T, H, W, 3]``), a clip and its reversal one after the other."""
    random = torch.Generator().manual_seed(2 * seed + (split == "test"))
    digits, values = load(split)
    out = []
    for forward, backward, direction in PAIRS:
        half = count // 8
        chosen = torch.randint(len(digits), (half,), generator=random)
        path = [part.flatten() for part in trajectories(half, direction, random)]
        frames = render(digits[chosen].repeat_interleave(FRAMES, 0), *path).unflatten(0, (half, FRAMES))
        for value, clip in zip(values[chosen].tolist(), frames):
            out += [(forward, value, clip), (backward, value, clip.flip(0))]
    return out


def write(folder: Path, config: DataConfig) -> bool:
    """The set as ``folder/{train,test}/<motion>/<number>_<digit>.mp4`` with captions in ``train.csv`` and ``test.csv``.

    Lossless H.264, so that a clip and its reversal hold the very same pictures. False if it was there already.
    """
    done = folder / "data.json"
    wanted = {**asdict(config), "size": SIZE, "frames": FRAMES, "version": 1}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return False
    done.unlink(missing_ok=True)
    for split, count in (("train", config.train), ("test", config.test)):
        rows = []
        shutil.rmtree(folder / split, ignore_errors=True)
        for motion in MOTIONS:
            (folder / split / motion).mkdir(parents=True, exist_ok=True)
        for number, (motion, value, frames) in enumerate(clips(split, count, config.seed)):
            path = f"{split}/{motion}/{number:04d}_{NAMES[value]}.mp4"
            write_video(folder / path, frames, FPS, options={"qp": "0", "preset": "veryfast"})
            rows.append((path, motion, caption(f"the digit {NAMES[value]}", motion)))
        with replacing(folder / f"{split}.csv") as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "caption"), *rows])
    write_json(done, wanted)
    return True
