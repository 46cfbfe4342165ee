"""The frozen image-text model as a video model: one table row per method, with the kernels and without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from i2v_kernels.extras import require
from i2v_kernels.video import ClipLoader
from i2v_models import FitConfig, VideoCLIP, build, evaluate, fit
from i2v_models.demo import data
from i2v_models.demo.stills import MODEL


@dataclass(frozen=True)
class Recipe:
    """A row of the table. ``steps=0`` is zero-shot: the text tower's captions of the motions are the classifier."""

    title: str
    method: str
    note: str
    steps: int = 0
    lr: float = 1e-2
    options: dict[str, Any] = field(default_factory=dict)
    twin: bool = True  # it has a temporal module, so that it can be computed without the kernels too


RECIPES = {
    "zero_shot": Recipe(
        "CLIP frame mean, zero-shot",
        "frame_mean",
        note="nothing is trained; the captions of the motions are the classifier; blind to the order of frames",
        twin=False,
    ),
    "frame_mean": Recipe(
        "CLIP frame mean + linear head",
        "frame_mean",
        steps=100,
        note="only the head is trained; blind to the order of frames",
        twin=False,
    ),
    "tokshift": Recipe(
        "TokShift + linear head",
        "tokshift",
        steps=100,
        note="only the head is trained here, on a frozen backbone; as published, all of the backbone is",
    ),
    "st_adapter": Recipe(
        "ST-Adapter",
        "st_adapter",
        steps=220,
        options={"width": 96},
        note="adapters with a depthwise temporal convolution, and a linear head",
    ),
    "aim": Recipe("AIM", "aim", steps=300, lr=5e-3, note="the frozen attention run over time, adapters, and a linear head"),
}


@dataclass(frozen=True)
class Result:
    """What one model reached on the held-out clips, and how fast it was trained."""

    accuracy: float
    parameters: int
    clips_per_second: float | None
    decode_share: float | None
    predictions: list[dict[str, Any]]


class Transfer:
    """The frozen model and the two sets of clips; every run starts from the same seed and sees the same batches."""

    def __init__(self, clip_model: nn.Module, folder: Path, *, seed: int, batch_size: int = 32) -> None:
        self.clip_model, self.folder, self.seed, self.batch_size = clip_model, folder, seed, batch_size
        self.tokenizer = require("open_clip", "i2v_models.demo").get_tokenizer(MODEL)

    def loader(self, split: str) -> ClipLoader:
        training = split == "train"
        return ClipLoader(
            self.folder / f"{split}.csv",
            frames=data.FRAMES,
            size=data.SIZE,
            batch_size=self.batch_size if training else 64,
            shuffle=training,
            drop_last=training,
            seed=self.seed,
        )

    def model(self, recipe: Recipe, kernels: bool) -> VideoCLIP:
        torch.manual_seed(self.seed)
        model = build(
            self.clip_model,
            recipe.method,
            frames=data.FRAMES,
            head="linear" if recipe.steps else "text",
            captions=[data.caption("the digit", motion) for motion in data.MOTIONS],
            tokenizer=self.tokenizer,
            kernels=kernels,
            **recipe.options,
        )
        if recipe.steps:
            model.head.dropout.p = 0.0  # half of the features, as published, is too few of this small model's
        return model

    def run(self, recipe: Recipe, kernels: bool = True) -> tuple[VideoCLIP, Result]:
        """Train (unless zero-shot) and test."""
        model = self.model(recipe, kernels)
        log: Sequence[dict[str, float]] = []
        if recipe.steps:
            config = FitConfig(steps=recipe.steps, lr=recipe.lr, seed=self.seed)
            log = fit(model, self.loader("train"), config)
        tested = evaluate(model, self.loader("test"))
        return model, Result(
            accuracy=tested["top1"],
            parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            clips_per_second=median(line["clips_per_second"] for line in log) if log else None,
            decode_share=mean(line["wait"] for line in log) if log else None,
            predictions=tested["predictions"],
        )
