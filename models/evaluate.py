"""Multi-view testing of any model that maps frames to logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from i2v_models import processes
from i2v_models.backbone import VideoCLIP
from i2v_models.fit import autocast, bad_videos, check_labels
from i2v_models.progress import Progress

UNLABELLED = "it has no label"


@torch.no_grad()
def predict(model: VideoCLIP, frames: Tensor, *, precision: str = "fp32") -> Tensor:
    """Class probabilities ``[B, classes]`` (fp32) of uint8 frames ``[B, T, H, W, 3]``.

    ``ValueError``: the model has no head; ``FloatingPointError``: what it gives is not finite.
    """
    if getattr(model, "head", model) is None:
        raise ValueError("the model has no head (head='text' or 'linear'), so it gives no classes")
    device = model.image_mean.device
    with autocast(device, precision):
        logits = model(frames.to(device))
    probabilities = logits.float().softmax(-1)
    if not bool(probabilities.isfinite().all()):
        raise FloatingPointError(f"the model gives NaN or Inf in precision={precision!r}; another one may help")
    return probabilities


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
    ``valid``, as ``i2v_kernels.video.ClipLoader``. Rows that are not valid (repeats, stand-ins for bad files)
    do not count, so a video that cannot be read is left out, and so is one without a label (-1). ``class_index`` gives
    the model's class of each label of the loader, if they differ. Where ``loader`` is one process's share, all of them
    call this and get the result of the whole.

    Returns ``{"top1", "top5", "videos", "predictions": [{"path", "label", "prediction", "probability"}], "left_out": {path:
    reason}, "bad": {path: reason}}``; ``bad`` are all files with a fault, those that were used as far as they go too.
    ``ValueError``: a label is none of the model's classes, or no video is left to score.
    """
    model.eval()
    shared = getattr(loader, "world_size", 1) > 1
    with processes.together() if shared else nullcontext():
        mine = _scores(model, loader, precision, class_index, progress), _faults(loader)
    scores: dict[int, list[Any]] = {}
    left_out: dict[str, str] = {}
    bad: dict[str, str] = {}
    for (part, unlabelled), faults in processes.gathered(mine) if shared else [mine]:
        left_out |= unlabelled
        bad |= faults
        for item, (path, label, views, total) in part.items():
            before = scores.setdefault(item, [path, label, 0, 0.0])
            before[2:] = before[2] + views, before[3] + total
    predictions, top1, top5 = [], 0, 0
    for _, (path, label, views, total) in sorted(scores.items()):
        probability = total / views
        ranked = probability.argsort(descending=True)[:5].tolist()
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked)
        line = {"path": path, "label": label, "prediction": ranked[0], "probability": float(probability[ranked[0]])}
        predictions.append(line)
    used = {line["path"] for line in predictions}
    left_out = {path: reason for path, reason in (bad | left_out).items() if path not in used}
    count = len(predictions)
    if not count:
        examples = "; ".join(f"{path}: {reason}" for path, reason in list(left_out.items())[:3])
        raise ValueError(f"there is no video to score; {len(left_out)} were left out ({examples})")
    accuracy = {"top1": top1 / count, "top5": top5 / count, "videos": count}
    return {**accuracy, "predictions": predictions, "left_out": left_out, "bad": bad}


def _scores(
    model: VideoCLIP, loader: Any, precision: str, class_index: Sequence[int] | None, progress: bool
) -> tuple[dict[int, tuple[str, int, int, Tensor]], dict[str, str]]:
    """Path, class, views and the sum of their probabilities for every video of this process, and those without a label.

    Summed in double precision, where the order does not show: views of one video may come from several processes.
    """
    scores: dict[int, tuple[str, int, int, Tensor]] = {}
    unlabelled: dict[str, str] = {}
    with Progress(len(loader), "batch", show=progress and processes.is_first()) as bar:
        for batch in loader:
            valid, label = torch.as_tensor(batch.valid).cpu(), torch.as_tensor(batch.label).cpu()
            unlabelled |= {batch.path[row]: UNLABELLED for row in (valid & (label < 0)).nonzero().flatten().tolist()}
            rows = (valid & (label >= 0)).nonzero().flatten()
            if len(rows):
                if class_index is not None:
                    check_labels(label[rows], [batch.path[row] for row in rows.tolist()], len(class_index))
                    label[rows] = torch.tensor(class_index)[label[rows]]
                frames = batch.frames if len(rows) == len(label) else batch.frames[rows]
                probabilities = predict(model, frames, precision=precision).cpu().double()
                check_labels(label[rows], [batch.path[row] for row in rows.tolist()], probabilities.shape[1])
                for row, probability in zip(rows.tolist(), probabilities):
                    item = int(batch.item[row])
                    _, _, views, total = scores.get(item, ("", 0, 0, 0.0))
                    scores[item] = batch.path[row], int(label[row]), views + 1, total + probability
            bar.update()
    return scores, unlabelled


def _faults(loader: Any) -> dict[str, str]:
    return bad_videos(loader) if hasattr(loader, "report") else {}
