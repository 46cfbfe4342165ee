"""Train a video model: ``python -m i2v_models.train --method st_adapter --data DIR --model ViT-B-16 --pretrained
openai``. ``--task retrieval`` learns from captions instead of classes.

Under ``torchrun`` every process trains on its share of the videos and gradients are averaged. SIGTERM and Ctrl-C save after
the step at hand and end the program with 143 and 130; the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from i2v_kernels.video import ClipLoader, VideoError
from i2v_models import processes, run, signals
from i2v_models.backbone import VideoCLIP, check_vit
from i2v_models.build import build, load_clip
from i2v_models.checkpoint import first_line
from i2v_models.config import TrainConfig, parse
from i2v_models.fit import Trainer
from i2v_models.tasks import TASKS, Task
from i2v_models.tasks.task import Tokenizer


def pick_device(name: str) -> torch.device:
    """``auto`` is this process's GPU where there is one; ``ValueError`` for a device that is not there."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.ones(1, device=name)
        probe.cpu()  # "meta" holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used: {first_line(error)}") from error
    return probe.device


@contextmanager
def command(device: str) -> Iterator[None]:
    """A command's body: under ``torchrun`` with its processes connected; what cannot be ends it with one sentence."""
    with signals.ending():
        begun = False
        try:
            if "RANK" in os.environ and not dist.is_initialized():
                dist.init_process_group("nccl" if pick_device(device).type == "cuda" else "gloo")
                begun = True
            yield
        except (ValueError, OSError, ImportError, FloatingPointError, VideoError) as error:
            sys.exit(f"error: {error}")
        finally:
            if begun:
                dist.destroy_process_group()


def load_image_model(config: TrainConfig) -> tuple[Any, Tokenizer]:
    """The image-text model of a run on its device; random weights (``pretrained='none'``) follow from the seed."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    clip_model, tokenizer = load_clip(config.model, None if config.pretrained == "none" else config.pretrained)
    try:
        check_vit(clip_model)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"model={config.model!r} cannot be used: {error}") from error
    return clip_model.to(device), tokenizer


def make_model(config: TrainConfig, task: Task, clip_model: Any, tokenizer: Tokenizer) -> VideoCLIP:
    """The model that a run starts from; the same again for the same settings."""
    torch.manual_seed(config.seed)
    return build(
        clip_model,
        config.method,
        frames=config.frames,
        tokenizer=tokenizer,
        kernels=config.kernels,
        train_backbone=config.train_backbone,
        checkpointing=config.checkpointing,
        spatial=config.spatial,
        **task.head(config),
        **{name: value for name in ("width", "adapters") if (value := getattr(config, name)) is not None},
    )


def prepare(config: TrainConfig) -> Trainer:
    """Model, loader and the state to resume from; ``ValueError`` says which setting cannot be."""
    with processes.together():
        clip_model, tokenizer = load_image_model(config)
        height, width = clip_model.visual.image_size
        if height != width:
            raise ValueError(f"model={config.model!r} takes {height}x{width} images; clips are square")
        make_loader = partial(
            ClipLoader,
            frames=config.frames,
            sampling=config.sampling,
            size=height,
            batch_size=config.batch_size,
            crop=config.crop,
            flip=config.flip,
            workers=config.workers,
            backend=config.decoder,
            index_cache=config.index_cache,
            shuffle=True,
            seed=config.seed,
            pin_memory=True,
        )
        task, loader = TASKS[config.task].begin(config, make_loader, tokenizer)
        digests = {"pretrained_digest": run.digest(clip_model.state_dict()), "data_digest": run.data_digest(loader)}
        model = make_model(config, task, clip_model, tokenizer)
    return Trainer(model, loader, config, digests, task)


def train(config: TrainConfig) -> tuple[VideoCLIP, list[dict[str, float]]]:
    """A whole run, new or resumed: the trained model and the lines of the log."""
    trainer = prepare(config)
    return trainer.model, trainer.run()


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(TrainConfig, "python -m i2v_models.train", argv)
    with command(config.device):
        trainer = prepare(config)
        if processes.is_first():
            count = sum(parameter.numel() for parameter in trainer.parameters)
            print(
                f"{config.method} on {config.model}: {count / 1e6:.3f} M trainable parameters, "
                f"step {trainer.step} of {trainer.steps}, output in {config.output}",
                flush=True,
            )
        trainer.run()
        if processes.is_first():
            for path, reason in trainer.bad.items():
                print(f"bad video: {path}: {reason}")
            skipped = f", {trainer.skipped} of them skipped by fp16" if trainer.skipped else ""
            print(f"done: {trainer.steps} steps{skipped}, {len(trainer.bad)} bad videos, see {config.output}")


if __name__ == "__main__":
    main()
