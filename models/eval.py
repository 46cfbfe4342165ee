"""Test a trained model: ``python -m i2v_models.eval --checkpoint runs/train --data DIR --views 4 3``.

A retrieval run is tested on a CSV of path,caption: recall and ranks, from text to video and from video to text. Under
``torchrun`` every process takes its share of the videos; the result is that of one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

from i2v_kernels.video import ClipLoader
from i2v_models import checkpoint, processes, run
from i2v_models.backbone import VideoCLIP
from i2v_models.config import EvalConfig, TrainConfig, parse
from i2v_models.precision import DTYPES
from i2v_models.spatial import check_flash
from i2v_models.tasks import TASKS, Classification, Task
from i2v_models.train import command, load_image_model, make_model


def load_run(
    folder: str | Path, *, device: str = "auto", pretrained: str | None = None, spatial: str | None = None
) -> tuple[VideoCLIP, TrainConfig, list[str]]:
    """The model of a training run with its newest weights, its settings and its class names (none of a retrieval run).

    ``pretrained`` says where the weights that the run began with are now; ``spatial``: another than it was trained with.
    ``ValueError`` and ``OSError`` say what cannot be read or does not fit.
    """
    model, config, task = open_run(folder, device=device, pretrained=pretrained, spatial=spatial)
    return model, config, task.classes if isinstance(task, Classification) else []


def open_run(
    folder: str | Path, *, device: str = "auto", pretrained: str | None = None, spatial: str | None = None
) -> tuple[VideoCLIP, TrainConfig, Task]:
    """As ``load_run``, with the task that the model was trained for."""
    folder = Path(folder)
    record, found = processes.from_first(lambda: _read(folder))
    with processes.together():
        known = {item.name: record.get(item.name, item.default) for item in fields(TrainConfig)}
        missing = [name for name, value in known.items() if value is MISSING]
        if missing:
            raise ValueError(f"{folder / 'config.json'} is not of a training run: it has no {missing[0]}")
        given = {"device": device, "pretrained": pretrained, "spatial": spatial}
        config = TrainConfig(**known | {name: value for name, value in given.items() if value is not None})
        clip_model, tokenizer = load_image_model(config)
        was, now = record.get("pretrained_digest"), run.digest(clip_model.state_dict())
        if was not in (None, now):
            raise ValueError(f"pretrained={config.pretrained!r} holds other weights ({now}) than the run began with ({was})")
        try:
            task = TASKS[config.task].of_run(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'} is not of a training run: {error}") from error
        model = make_model(config, task, clip_model, tokenizer)
        model.load_trainable_state_dict(found.weights)
    return model.eval(), config, task


def _read(folder: Path) -> tuple[dict[str, Any], checkpoint.Checkpoint]:
    record = run.read_record(folder)
    if record is None:
        raise ValueError(f"checkpoint={str(folder)!r} is not the output folder of a training run: no config.json")
    found = checkpoint.load(folder)
    if found is None:
        raise ValueError(f"checkpoint={str(folder)!r} holds no finished checkpoint")
    return record, found


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(EvalConfig, "python -m i2v_models.eval", argv)
    output = Path(config.output or Path(config.checkpoint) / "eval.json")
    with command(config.device):
        how = {"device": config.device, "pretrained": config.pretrained, "spatial": config.spatial}
        model, trained, task = open_run(config.checkpoint, **how)
        processes.from_first(lambda: checkpoint.check_writable(output))
        with processes.together():
            check_flash(model, DTYPES[config.precision])
            make_loader = partial(
                ClipLoader,
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
            loader, known = task.test_data(config.data, make_loader)
        mine = len(loader), run.data_digest(loader), hashlib.blake2b(repr(known).encode()).hexdigest()
        if len(set(processes.gathered(mine))) > 1:
            raise ValueError(f"data={config.data!r} is not the same for all processes")
        result = task.test(model, loader, known, config.precision)
        result |= {"views": config.views, "checkpoint": config.checkpoint, "data": config.data}
        if not processes.is_first():
            return
        print(task.told(result), flush=True)
        checkpoint.write_json(output, result)
        print(f"see {output}")


if __name__ == "__main__":
    main()
