"""Multi-view testing: of any model that maps frames to logits, and of any vectors that videos have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2v_models import processes
from i2v_models.backbone import VideoCLIP
from i2v_models.batches import bad_videos, check_labels
from i2v_models.precision import autocast
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
    unlabelled: dict[str, str] = {}

    def wanted(batch: Any) -> Tensor:
        valid, label = torch.as_tensor(batch.valid).cpu(), torch.as_tensor(batch.label).cpu()
        unlabelled.update({batch.path[row]: UNLABELLED for row in (valid & (label < 0)).nonzero().flatten().tolist()})
        return (valid & (label >= 0)).nonzero().flatten()

    def scores(frames: Tensor, batch: Any, rows: Tensor) -> tuple[Tensor, list[int]]:
        label, path = torch.as_tensor(batch.label).cpu()[rows], [batch.path[row] for row in rows.tolist()]
        if class_index is not None:
            check_labels(label, path, len(class_index))
            label = torch.tensor(class_index)[label]
        probabilities = predict(model, frames, precision=precision)
        check_labels(label, path, probabilities.shape[1])
        return probabilities, label.tolist()

    videos, left_out, bad = averaged(loader, wanted, scores, unlabelled, progress)
    predictions, top1, top5 = [], 0, 0
    for _, path, label, probability in videos:
        ranked = probability.argsort(descending=True)[:5].tolist()
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked)
        line = {"path": path, "label": label, "prediction": ranked[0], "probability": float(probability[ranked[0]])}
        predictions.append(line)
    count = len(predictions)
    accuracy = {"top1": top1 / count, "top5": top5 / count, "videos": count}
    return {**accuracy, "predictions": predictions, "left_out": left_out, "bad": bad}


class Averaged(NamedTuple):
    """A video: its number, its path, what ``vectors`` said of it, and the mean of its views' vectors in double precision."""

    item: int
    path: str
    known: Any
    mean: Tensor


def averaged(
    loader: Any,
    wanted: Callable[[Any], Tensor],
    vectors: Callable[[Tensor, Any, Tensor], tuple[Tensor, Sequence[Any]]],
    unused: dict[str, str],
    progress: bool,
) -> tuple[list[Averaged], dict[str, str], dict[str, str]]:
    """Every video by its number, with the mean of its views' vectors; paths and reasons of what is left out, and of all faults.

    ``wanted(batch)`` are the rows to use; ``vectors(frames, batch, rows)`` gives a vector ``[rows, D]`` for each, and what else
    there is to know of its video. ``unused`` says afterwards which videos were not wanted, and why. Where ``loader`` is one
    process's share, all of them call this and get the whole. ``ValueError``: no video is left.
    """
    shared = getattr(loader, "world_size", 1) > 1
    with processes.together() if shared else nullcontext():
        mine = _summed(loader, wanted, vectors, progress), unused, bad_videos(loader) if hasattr(loader, "report") else {}
    sums: dict[int, list[Any]] = {}
    left_out: dict[str, str] = {}
    bad: dict[str, str] = {}
    for part, reasons, faults in processes.gathered(mine) if shared else [mine]:
        left_out |= reasons
        bad |= faults
        for item, (path, known, views, total) in part.items():
            before = sums.setdefault(item, [path, known, 0, 0.0])
            before[2:] = before[2] + views, before[3] + total
    videos = [Averaged(item, path, known, total / views) for item, (path, known, views, total) in sorted(sums.items())]
    used = {video.path for video in videos}
    left_out = {path: reason for path, reason in (bad | left_out).items() if path not in used}
    if not videos:
        examples = "; ".join(f"{path}: {reason}" for path, reason in list(left_out.items())[:3])
        raise ValueError(f"there is no video to score; {len(left_out)} were left out ({examples})")
    return videos, left_out, bad


def _summed(
    loader: Any,
    wanted: Callable[[Any], Tensor],
    vectors: Callable[[Tensor, Any, Tensor], tuple[Tensor, Sequence[Any]]],
    progress: bool,
) -> dict[int, tuple[str, Any, int, Tensor]]:
    """Path, what is known, views and the sum of their vectors for every video of this process.

    Summed in double precision, where the order does not show: views of one video may come from several processes.
    """
    sums: dict[int, tuple[str, Any, int, Tensor]] = {}
    with Progress(len(loader), "batch", show=progress and processes.is_first()) as bar:
        for batch in loader:
            rows = wanted(batch)
            if len(rows):
                frames = batch.frames if len(rows) == len(batch.frames) else batch.frames[rows]
                found, known = vectors(frames, batch, rows)
                for row, vector, fact in zip(rows.tolist(), found.cpu().double(), known):
                    item = int(batch.item[row])
                    _, _, views, total = sums.get(item, ("", None, 0, 0.0))
                    sums[item] = batch.path[row], fact, views + 1, total + vector
            bar.update()
    return sums
