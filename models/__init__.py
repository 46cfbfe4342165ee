"""Reference video models on open_clip backbones: build, train, evaluate."""

from __future__ import annotations

from i2v_models.backbone import Method, VideoCLIP
from i2v_models.build import build, load_clip
from i2v_models.config import FitConfig
from i2v_models.evaluate import evaluate, predict
from i2v_models.fit import fit

__all__ = ["FitConfig", "Method", "VideoCLIP", "build", "evaluate", "fit", "load_clip", "predict"]
