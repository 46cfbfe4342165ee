"""Test a trained model: ``python -m i2v_models.eval --checkpoint runs/train --data DIR --views 4 3``.

Under ``torchrun`` every process takes its share of the videos; the result is that of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from i2v_kernels.video import ClipLoader
from i2v_models import checkpoint, processes, run
from i2v_models.backbone import VideoCLIP
from i2v_models.config import EvalConfig, TrainConfig, parse
from i2v_models.evaluate import UNLABELLED, evaluate
from i2v_models.fit import DTYPES
from i2v_models.spatial import check_flash
from i2v_models.train import command, load_image_model, make_model


def load_run(
    folder: str | Path, *, device: str = "auto", pretrained: str | None = None, spatial: str | None = None
) -> tuple[VideoCLIP, TrainConfig, list[str]]:
    """The model of a training run with its newest weights, its settings and its class names.

    ``pretrained`` says where the weights that the run began with are now; ``spatial``: another than it was trained with.
    ``ValueError`` and ``OSError`` say what cannot be read or does not fit.
    """
    folder = Path(folder)
    record, found = processes.from_first(lambda: _read(folder))
    with processes.together():
        known = {item.name: record.get(item.name, item.default) for item in fields(TrainConfig)}
        missing = [name for name, value in known.items() if value is MISSING]
        if missing or not isinstance(record.get("classes"), list):
            raise ValueError(f"{folder / 'config.json'} is not of a training run: it has no {(missing or ['classes'])[0]}")
        given = {"device": device, "pretrained": pretrained, "spatial": spatial}
        config = TrainConfig(**known | {name: value for name, value in given.items() if value is not None})
        classes = record["classes"]
        clip_model, tokenizer = load_image_model(config)
        was, now = record.get("pretrained_digest"), run.digest(clip_model.state_dict())
        if was not in (None, now):
            raise ValueError(f"pretrained={config.pretrained!r} holds other weights ({now}) than the run began with ({was})")
        model = make_model(config, classes, clip_model, tokenizer)
        model.load_trainable_state_dict(found.weights)
    return model.eval(), config, classes


def _read(folder: Path) -> tuple[dict[str, Any], checkpoint.Checkpoint]:
    record = run.read_record(folder)
    if record is None:
        raise ValueError(f"checkpoint={str(folder)!r} is not the output folder of a training run: no config.json")
    found = checkpoint.load(folder)
    if found is None:
        raise ValueError(f"checkpoint={str(folder)!r} holds no finished checkpoint")
    return record, found


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


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvalConfig, "python -m i2v_models.eval", argv)
    output = Path(config.output or Path(config.checkpoint) / "eval.json")
    with command(config.device):
        how = {"device": config.device, "pretrained": config.pretrained, "spatial": config.spatial}
        model, trained, classes = load_run(config.checkpoint, **how)
        processes.from_first(lambda: checkpoint.check_writable(output))
        with processes.together():
            check_flash(model, DTYPES[config.precision])
            loader = ClipLoader(
                config.data,
                frames=trained.frames,
                sampling=config.sampling,
                size=model.image_size[0],
                batch_size=config.batch_size,
                workers=config.workers,
                backend=config.decoder,
                index_cache=config.index_cache,
                views=config.views,
                on_error="skip",
            )
            index = class_index(loader, classes, config.data)
        if len(set(processes.gathered((len(loader), run.data_digest(loader))))) > 1:
            raise ValueError(f"data={config.data!r} is not the same for all processes")
        result = evaluate(model, loader, precision=config.precision, class_index=index, progress=True)
        result |= {"views": config.views, "checkpoint": config.checkpoint, "data": config.data}
        if not processes.is_first():
            return
        accuracy = f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} on {result['videos']} videos"
        print(accuracy + left_out(result), flush=True)
        checkpoint.write_json(output, result)
        print(f"see {output}")


def left_out(result: dict[str, Any]) -> str:
    """What the accuracy is not of, for people."""
    unlabelled = list(result["left_out"].values()).count(UNLABELLED)
    counts = {"without a label": unlabelled, "that cannot be read": len(result["left_out"]) - unlabelled}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return f"; left out: {', '.join(parts)}" if parts else ""


if __name__ == "__main__":
    main()
