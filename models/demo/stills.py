"""A small image-text model of open_clip's own kind, trained on still frames and captions: it never sees time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2v_kernels.extras import require
from i2v_models.build import load_clip
from i2v_models.checkpoint import replacing
from i2v_models.config import FitConfig, fixed
from i2v_models.demo import data
from i2v_models.fit import learning_rate

MODEL = "moving-digits"
CONFIG = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": data.SIZE, "patch_size": 8, "width": 96, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
REACH = 10.0  # digits stand at most this many pixels from the middle, in x and in y
SMALLEST, LARGEST = 11.0, 18.0
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
CAPTIONS = {
    "digit": tuple(f"the digit {name}" for name in data.NAMES),
    "place": tuple(f"a digit at the {place}" for place in PLACES),
    "size": tuple(f"a {size} digit" for size in ("small", "medium", "large")),
}


@dataclass(kw_only=True, frozen=True)
class StillsConfig(FitConfig):
    """Settings of ``train``."""

    steps: int = fixed(900, "optimizer steps", above=0)
    lr: float = fixed(2e-3, "highest learning rate", above=0)
    batch_size: int = fixed(64, "stills per step", above=0)


class Stills(NamedTuple):
    """Frames ``[N, H, W, 3]`` and, for every family of captions, the number of the right one ``[N]``."""

    frames: Tensor
    captions: dict[str, Tensor]


def register(folder: Path) -> None:
    """Make the small model known to open_clip, as ``open_clip.create_model("moving-digits")``."""
    path = folder / f"{MODEL}.json"
    path.write_text(json.dumps(CONFIG, indent=1) + "\n")
    require("open_clip", "i2v_models.demo").add_model_config(path)


def draw(split: str, count: int, random: torch.Generator, reach: float = REACH) -> Stills:
    """Still digits of any size, at most ``reach`` pixels from the middle."""
    digits, values = data.load(split)
    chosen = torch.randint(len(digits), (count,), generator=random)
    uniform = data.uniform(count, random)
    x, y, size = uniform(-reach, reach), uniform(-reach, reach), uniform(SMALLEST, LARGEST)
    frames = data.render(digits[chosen], x + data.SIZE / 2, y + data.SIZE / 2, size)
    column, row = third(x, -REACH, REACH), third(y, -REACH, REACH)
    return Stills(frames, {"digit": values[chosen], "place": 3 * row + column, "size": third(size, SMALLEST, LARGEST)})


def third(x: Tensor, low: float, high: float) -> Tensor:
    """0, 1 or 2: the part of low..high that ``x`` is in."""
    return ((x - low) / (high - low) * 3).long().clamp(0, 2)


def logits(model: nn.Module, tokens: dict[str, Tensor], frames: Tensor) -> dict[str, Tensor]:
    """Scaled cosine similarities ``[N, captions]`` of every frame to all captions of every family."""
    device = model.logit_scale.device
    mean, std = (torch.tensor(stat, device=device) for stat in (model.visual.image_mean, model.visual.image_std))
    images = ((frames.to(device) / 255 - mean) / std).movedim(-1, 1)
    text = model.encode_text(torch.cat(list(tokens.values())).to(device), normalize=True)
    similarity = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ text.T
    return dict(zip(tokens, similarity.split([len(family) for family in tokens.values()], dim=1)))


def train(config: StillsConfig, device: torch.device, progress: Callable[[int, float], None]) -> nn.Module:
    """Image and text tower from random weights; within each family the right caption has to win over the others."""
    torch.manual_seed(config.seed)
    model, tokenizer = load_clip(MODEL, None)
    with torch.no_grad():  # as loud as the patches, or where a digit is is learned long after what it is
        model.visual.positional_embedding.mul_(10)
    model.to(device).train()
    tokens = {family: tokenizer(list(captions)) for family, captions in CAPTIONS.items()}
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    random = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        # digits are first learned in the middle and then further and further away, which is much quicker
        reach = REACH * min(1.0, max(0.1, 1.8 * step / config.steps - 0.25))
        batch = draw("train", config.batch_size, random, reach)
        scores = logits(model, tokens, batch.frames)
        loss = sum(
            (2 if family == "digit" else 1) * F.cross_entropy(scores[family], right.to(device))
            for family, right in batch.captions.items()
        )
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, config.steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        progress(step + 1, loss.item())
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, count: int = 2000) -> dict[str, float]:
    """How often the right caption of each family wins, on test digits that training has not seen."""
    tokenizer = require("open_clip", "i2v_models.demo").get_tokenizer(MODEL)
    tokens = {family: tokenizer(list(captions)) for family, captions in CAPTIONS.items()}
    batch = draw("test", count, torch.Generator().manual_seed(0))
    scores = logits(model, tokens, batch.frames)
    return {family: (scores[family].argmax(1).cpu() == right).float().mean().item() for family, right in batch.captions.items()}


def get(
    folder: Path, config: StillsConfig, device: torch.device, progress: Callable[[int, float], None]
) -> tuple[nn.Module, bool]:
    """The trained model, from ``folder`` if it was trained before with these settings; True if it was."""
    register(folder)
    path, settings = folder / f"{MODEL}.pt", {**asdict(config), "model": CONFIG, "version": 1}
    if path.exists():
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found["settings"] == settings:
            model, _ = load_clip(MODEL, None)
            model.load_state_dict(found["weights"])
            return model.to(device).eval(), True
    model = train(config, device, progress)
    with replacing(path) as temporary:
        torch.save({"settings": settings, "weights": model.state_dict()}, temporary)
    return model, False
