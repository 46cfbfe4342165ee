"""Reference video models on open_clip backbones: build, train, evaluate."""

from __future__ import annotations

from i2v_models.backbone import Method, VideoCLIP
from i2v_models.build import build, load_clip

__all__ = ["Method", "VideoCLIP", "build", "load_clip"]
