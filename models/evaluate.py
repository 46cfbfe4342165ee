"""Multi-view testing of any model that maps frames to logits."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from i2v_models.backbone import VideoCLIP
from i2v_models.fit import autocast


@torch.no_grad()
def predict(model: VideoCLIP, frames: torch.Tensor, *, precision: str = "fp32") -> torch.Tensor:
    """Class probabilities ``[B, classes]`` of uint8 ``[B, T, H, W, 3]``, or of ``[B, V, T, H, W, 3]``: the mean
    over views.
    """
    device = model.image_mean.device
    views = frames.shape[1] if frames.ndim == 6 else 1
    if frames.ndim == 6:
        frames = frames.flatten(0, 1)
    with autocast(device, precision):
        logits = model(frames.to(device))
    return logits.float().softmax(-1).unflatten(0, (-1, views)).mean(1)


def evaluate(model: VideoCLIP, loader: Any, *, precision: str = "fp32", progress: bool = False) -> dict[str, Any]:
    """Top-1 and top-5 accuracy over ``loader``, whose batches have ``frames``, ``label``, ``path`` and ``valid``.

    Returns ``{"top1", "top5", "videos", "predictions": [{"path", "label", "prediction", "probability"}]}``. A video
    that could not be read (``valid`` False) is not counted; ``loader.report()`` names it.
    """
    model.eval()
    predictions, top1, top5 = [], 0, 0
    for batch in tqdm(loader, unit="batch", disable=not progress):
        probabilities = predict(model, batch.frames, precision=precision).cpu()
        best = probabilities.topk(min(5, probabilities.shape[1]), dim=-1)
        for row, (path, label, valid) in enumerate(zip(batch.path, torch.as_tensor(batch.label).tolist(), batch.valid)):
            if not valid:
                continue
            ranked = best.indices[row].tolist()
            top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked)
            predictions.append(
                {"path": str(path), "label": label, "prediction": ranked[0], "probability": float(best.values[row, 0])}
            )
    count = len(predictions)
    return {"top1": top1 / max(1, count), "top5": top5 / max(1, count), "videos": count, "predictions": predictions}
