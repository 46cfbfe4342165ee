"""Tiny open_clip models with seeded random weights; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from open_clip.model import CLIP

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def tiny_clip(seed: int = 0, **vision) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(embed_dim=32, vision_cfg={**VISION, **vision}, text_cfg=TEXT)


@pytest.fixture
def clip_model() -> CLIP:
    return tiny_clip()


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
