"""Test a trained model: ``python -m i2v_models.eval --checkpoint runs/train --data DIR --views 4 3``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from i2v_kernels.video import ClipLoader
from i2v_models import checkpoint
from i2v_models.backbone import VideoCLIP
from i2v_models.config import EvalConfig, TrainConfig, parse
from i2v_models.evaluate import evaluate
from i2v_models.fit import bad_videos
from i2v_models.train import load_image_model, make_model


def load_run(folder: str | Path, *, device: str = "auto") -> tuple[VideoCLIP, TrainConfig, list[str]]:
    """The model of a training run with its newest weights, its settings and its class names."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"checkpoint={str(folder)!r} is not the output folder of a training run: no config.json")
    record = json.loads(path.read_text())
    config = TrainConfig(**{item.name: record[item.name] for item in fields(TrainConfig)} | {"device": device})
    found = checkpoint.load(Path(folder))
    if found is None:
        raise ValueError(f"checkpoint={str(folder)!r} holds no finished checkpoint")
    model = make_model(config, record["classes"], *load_image_model(config))
    model.load_trainable_state_dict(found.weights)
    return model.eval(), config, record["classes"]


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvalConfig, "python -m i2v_models.eval", argv)
    try:
        model, trained, classes = load_run(config.checkpoint, device=config.device)
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
        )
        if unknown := set(loader.classes) - set(classes):
            raise ValueError(f"data={config.data!r} has classes the model does not know: {', '.join(sorted(unknown))}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    class_index = [classes.index(name) for name in loader.classes] or None
    result = evaluate(model, loader, precision=config.precision, class_index=class_index, progress=True)
    result |= {"views": config.views, "checkpoint": config.checkpoint, "data": config.data, "bad": bad_videos(loader)}
    output = Path(config.output or Path(config.checkpoint) / "eval.json")
    checkpoint.write_json(output, result)
    print(f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%} on {result['videos']} videos; see {output}")


if __name__ == "__main__":
    main()
