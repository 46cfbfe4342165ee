"""Which of a run's classes a video is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from i2v_kernels.video import ClipLoader
from i2v_models.backbone import VideoCLIP
from i2v_models.batches import Clips, check_labels
from i2v_models.evaluate import UNLABELLED, evaluate
from i2v_models.tasks.task import MakeLoader, Task, Tokenizer

if TYPE_CHECKING:
    from i2v_models.config import FitConfig, TrainConfig

MOST_CLASSES = 1_000_000  # of labels that are numbers: a head has a row for each


class Classification(Task):
    """Cross-entropy of the model's logits and the clips' labels; ``classes`` are their names, if there are any."""

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes = list(classes)

    def check(self, model: VideoCLIP) -> None:
        if getattr(model, "head", self) is None:
            raise ValueError("the model has no head (head='text' or 'linear'), so it gives no logits to train on")

    def record(self) -> dict[str, Any]:
        return {"classes": self.classes} if self.classes else {}

    def forward(self, model: VideoCLIP, clips: Clips, config: FitConfig) -> tuple[Tensor, Tensor]:
        device = model.image_mean.device
        logits = model(clips.frames.to(device, non_blocking=True))
        check_labels(clips.label, clips.path, logits.shape[1])
        return logits, clips.label.to(device, non_blocking=True)

    def loss(self, model: VideoCLIP, outputs: Any, counts: list[int], config: FitConfig) -> Tensor:
        logits, label = outputs
        return F.cross_entropy(logits.float(), label, label_smoothing=config.label_smoothing, reduction="sum")

    @classmethod
    def begin(cls, config: TrainConfig, make_loader: MakeLoader, tokenizer: Tokenizer) -> tuple[Task, ClipLoader]:
        loader = make_loader(config.data)
        return cls(class_names(config, loader)), loader

    @classmethod
    def of_run(cls, record: Mapping[str, Any], tokenizer: Tokenizer) -> Task:
        if not isinstance(record.get("classes"), list):
            raise ValueError("it has no classes")
        return cls(record["classes"])

    def head(self, config: TrainConfig) -> dict[str, Any]:
        if "{}" not in config.caption:
            raise ValueError(f"caption={config.caption!r} has no {{}} for the name of the class")
        captions = [config.caption.replace("{}", name.replace("_", " ")) for name in self.classes]
        return {"head": config.head, "captions": captions}

    def test_data(self, data: str, make_loader: MakeLoader) -> tuple[ClipLoader, list[int]]:
        loader = make_loader(data)
        return loader, class_index(loader, self.classes, data)

    def test(self, model: VideoCLIP, loader: ClipLoader, known: Any, precision: str) -> dict[str, Any]:
        return evaluate(model, loader, precision=precision, class_index=known, progress=True)

    def told(self, result: dict[str, Any]) -> str:
        unlabelled = list(result["left_out"].values()).count(UNLABELLED)
        counts = {"without a label": unlabelled, "that cannot be read": len(result["left_out"]) - unlabelled}
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        left_out = f"; left out: {', '.join(parts)}" if parts else ""
        return f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} on {result['videos']} videos{left_out}"


def class_names(config: TrainConfig, loader: ClipLoader) -> list[str]:
    """Names of the classes; where labels are numbers, a linear head can do without names."""
    labels = [video.label for video in loader.videos]
    if min(labels) < 0:
        raise ValueError(
            f"data={config.data!r} has a video without a label: {loader.videos[labels.index(min(labels))].path}"
        )
    if not loader.classes and config.head == "text":
        raise ValueError(f"data={config.data!r} labels its classes by number; head='text' needs their names")
    if not loader.classes and max(labels) >= MOST_CLASSES:
        path = loader.videos[labels.index(max(labels))].path
        raise ValueError(f"data={config.data!r} must number classes 0, 1, ... below {MOST_CLASSES}, got {max(labels)}: {path}")
    return list(loader.classes) or [str(label) for label in range(max(labels) + 1)]


def class_index(loader: ClipLoader, classes: list[str], data: str) -> list[int]:
    """The model's class of each label of ``loader``; ``ValueError`` where the two cannot be matched."""
    if loader.classes:
        if unknown := set(loader.classes) - set(classes):
            raise ValueError(f"data={data!r} has classes the model does not know: {', '.join(sorted(unknown))}")
        return [classes.index(name) for name in loader.classes]
    labels = Counter(video.label for video in loader.videos if video.label >= 0)
    if not labels:
        raise ValueError(f"data={data!r} has no video with a label, so there is nothing to score")
    numbers = list(range(len(classes)))
    if classes != [str(number) for number in numbers]:
        names = ", ".join(classes[:5])
        raise ValueError(f"data={data!r} labels classes by number, the model was trained on their names ({names}, ...)")
    if max(labels) >= len(classes):
        raise ValueError(f"data={data!r} has the label {max(labels)}; the model has classes 0 to {len(classes) - 1}")
    return numbers
