"""Multi-view testing of any model that maps frames to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from i2v_models.backbone import VideoCLIP
from i2v_models.fit import autocast


@torch.no_grad()
def predict(model: VideoCLIP, frames: Tensor, *, precision: str = "fp32") -> Tensor:
    """Class probabilities ``[B, classes]`` (fp32) of uint8 frames ``[B, T, H, W, 3]``."""
    device = model.image_mean.device
    with autocast(device, precision):
        logits = model(frames.to(device))
    return logits.float().softmax(-1)


def evaluate(
    model: VideoCLIP,
    loader: Any,
    *,
    precision: str = "fp32",
    class_index: Sequence[int] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy; the probabilities of all views of a video are averaged.

    ``loader`` yields one clip per view, with ``frames``, ``label``, ``item`` (number of the video), ``path`` and
    ``valid``, as :class:`i2v_kernels.video.ClipLoader`. Rows that are not valid (repeats, stand-ins for bad files)
    do not count, so a video that cannot be read is left out. ``class_index`` gives the model's class of each label
    of the loader, if they differ.

    Returns ``{"top1", "top5", "videos", "predictions": [{"path", "label", "prediction", "probability"}]}``.
    """
    model.eval()
    sums: dict[int, Tensor] = {}
    views: dict[int, int] = {}
    videos: dict[int, tuple[str, int]] = {}
    for batch in tqdm(loader, unit="batch", disable=not progress):
        probabilities = predict(model, batch.frames, precision=precision).cpu()
        for row in batch.valid.nonzero().flatten().tolist():
            item, label = int(batch.item[row]), int(batch.label[row])
            sums[item] = sums.get(item, 0) + probabilities[row]
            views[item] = views.get(item, 0) + 1
            videos[item] = batch.path[row], label if class_index is None else class_index[label]
    predictions, top1, top5 = [], 0, 0
    for item, (path, label) in sorted(videos.items()):
        probability = sums[item] / views[item]
        ranked = probability.argsort(descending=True)[:5].tolist()
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked)
        line = {"path": path, "label": label, "prediction": ranked[0], "probability": float(probability[ranked[0]])}
        predictions.append(line)
    count = max(1, len(videos))
    return {"top1": top1 / count, "top5": top5 / count, "videos": len(videos), "predictions": predictions}
