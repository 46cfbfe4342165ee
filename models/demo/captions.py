"""Captions that name digit and motion, and the clips that they are of: an order-blind model beside one that sees time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from i2v_kernels.extras import require
from i2v_kernels.video import ClipLoader
from i2v_models import FitConfig, build, fit
from i2v_models.demo import data
from i2v_models.demo.stills import MODEL
from i2v_models.tasks import Captions, Retrieval, evaluate_retrieval, read_captions

METHODS = {"frame_mean": "frame mean", "tokshift": "TokShift"}  # neither adds a parameter: both towers are trained
STEPS, LR, BATCH = 160, 1e-3, 32


def loader(found: Captions, seed: int, batch_size: int, training: bool) -> ClipLoader:
    how: dict[str, Any] = {"shuffle": training, "drop_last": training, "seed": seed, "batch_size": batch_size}
    return ClipLoader(found.videos, frames=data.FRAMES, size=data.SIZE, **how)


def run(
    clip_model: nn.Module, train: Path, test: Path, *, seed: int, steps: int = STEPS, batch_size: int = BATCH
) -> dict[str, Any]:
    """Train a copy of the image-text model as each of ``METHODS`` on the list ``train``, and test it on ``test``.

    ``{"texts", "videos", "chance", "methods": {name: {"title", "text_to_video", "video_to_text"}}}``, shares of queries whose
    nearest neighbour is right (R@1). A caption of several clips is one text, for which all of them are right.
    """
    tokenizer = require("open_clip", "i2v_models.demo").get_tokenizer(MODEL)
    shown, asked = read_captions(train), read_captions(test)
    config = FitConfig(steps=steps, lr=LR, seed=seed)
    rows, result = {}, {}
    for name, title in METHODS.items():
        torch.manual_seed(seed)
        model = build(copy.deepcopy(clip_model), name, frames=data.FRAMES, head="retrieval", train_backbone=True)
        fit(model, loader(shown, seed, batch_size, training=True), config, task=Retrieval(shown.texts, tokenizer))
        result = evaluate_retrieval(model, loader(asked, seed, 64, training=False), asked.texts, tokenizer)
        rows[name] = {"title": title} | {way: result[way]["R@1"] / 100 for way in ("text_to_video", "video_to_text")}
    return {"texts": result["texts"], "videos": result["videos"], "chance": result["chance"] / 100, "methods": rows}
