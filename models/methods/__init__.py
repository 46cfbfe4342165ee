"""The transfer methods by name: ``create("st_adapter", visual, frames=8)``."""

from __future__ import annotations

import inspect
from typing import Any

from i2v_models.backbone import Method, ViT
from i2v_models.methods.aim import AIM
from i2v_models.methods.frame_mean import FrameMean
from i2v_models.methods.st_adapter import STAdapter
from i2v_models.methods.tokshift import TokShift

METHODS: dict[str, type[Method]] = {"frame_mean": FrameMean, "tokshift": TokShift, "st_adapter": STAdapter, "aim": AIM}

__all__ = ["AIM", "METHODS", "FrameMean", "STAdapter", "TokShift", "create"]


def create(name: str, visual: ViT, *, frames: int, kernels: bool = True, **options: Any) -> Method:
    """Build method ``name`` for the ViT ``visual``; ``ValueError`` names an unknown method or option."""
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; there are {', '.join(METHODS)}")
    accepted = set(inspect.signature(METHODS[name]).parameters) - {"visual", "frames", "kernels"}
    if unknown := sorted(options.keys() - accepted):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(accepted)) or 'none'}")
    return METHODS[name](visual, frames=frames, kernels=kernels, **options)
