"""The training loop: any model that maps a batch's frames to logits, any loader with a position to return to."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from i2v_models import checkpoint
from i2v_models.backbone import VideoCLIP
from i2v_models.config import FitConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, in two groups: weight decay on matrices and kernels, none on biases, norms and embeddings."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = {name for name, parameter in named if parameter.ndim < 2 or name.endswith("embedding")}
    return [
        {"params": [parameter for name, parameter in named if name not in spared], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name in spared], "weight_decay": 0.0},
    ]


def learning_rate(config: FitConfig, step: int, steps: int) -> float:
    """Linear warm-up to ``config.lr``, then a cosine to zero; ``step`` counts from 0."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def total_steps(config: FitConfig, loader: Any) -> int:
    if len(loader) == 0:
        raise ValueError("the loader has no batch: there are fewer clips than one batch needs, or none at all")
    return config.steps or max(1, int(config.epochs * len(loader) / config.accumulate))


def stream(loader: Any, epoch: int) -> Iterator[tuple[int, Any]]:
    """``(epoch, batch)`` without end. ``epoch`` is continued where the loader stands, the later ones start afresh."""
    while True:
        for batch in loader:
            yield epoch, batch
        epoch += 1
        loader.set_epoch(epoch)


def average_over_processes(parameters: list[nn.Parameter]) -> None:
    """The mean of every gradient over all processes, in one message."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat / dist.get_world_size()).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def bad_videos(loader: Any) -> dict[str, str]:
    """Path and reason of every video that could not be read so far."""
    return {path: reason for path, (reason, _) in loader.report().bad.items()}


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return not dist.is_initialized() or dist.get_rank() == 0


class Trainer:
    """One run of :func:`fit`, step by step. Random numbers depend on (seed, step, process) alone: nothing of them
    is saved.
    """

    def __init__(self, model: VideoCLIP, loader: Any, config: FitConfig, record: dict[str, Any] | None = None) -> None:
        self.model, self.loader, self.config = model, loader, config
        self.device = model.image_mean.device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError("nothing to train: no parameters here; take head='linear' or train_backbone=True")
        self.optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.steps = total_steps(config, loader)
        self.step, self.epoch = 0, 0
        self.sums: list[Any] = [0.0, 0]  # loss and steps since the last line of the log
        self.bad: dict[str, str] = {}
        self.output = Path(config.output) if config.output else None
        if _processes() > 1:
            for parameter in self.parameters:
                dist.broadcast(parameter.data, 0)
        loader.set_epoch(0)
        if self.output:
            self._open(self.output, {**asdict(config), "processes": _processes(), **(record or {})})

    def run(self) -> list[dict[str, float]]:
        """Train to the end; the lines of the log."""
        log = []
        batches = stream(self.loader, self.epoch)
        self.model.train()
        started, waited, clips = time.perf_counter(), 0.0, 0
        with tqdm(total=self.steps, initial=self.step, unit="step", disable=not is_first()) as bar:
            while self.step < self.steps:
                norm, wait, count = self._advance(batches)
                waited, clips = waited + wait, clips + count
                bar.update()
                last = self.step == self.steps
                saving = self.output is not None and (last or self.step % self.config.save_every == 0)
                logging = last or self.step % self.config.log_every == 0
                if saving or logging:
                    self._check_finite()
                if logging:
                    now = time.perf_counter()
                    log.append(self._line(norm, clips * _processes() / (now - started), waited / (now - started)))
                    started, waited, clips = now, 0.0, 0
                    bar.set_postfix_str(_summary(log[-1]), refresh=False)
                if saving:
                    self.save()
        return log

    def _advance(self, batches: Iterator[tuple[int, Any]]) -> tuple[Tensor, float, int]:
        """One optimizer step: gradient norm before clipping, seconds waited for data, clips seen."""
        config, waited, clips = self.config, 0.0, 0
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 4096 + rank)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.steps)
        total = torch.zeros((), device=self.device)
        for _ in range(config.accumulate):
            before = time.perf_counter()
            self.epoch, batch = next(batches)
            waited += time.perf_counter() - before
            frames = batch.frames.to(self.device, non_blocking=True)
            label = torch.as_tensor(batch.label).to(self.device, non_blocking=True)
            with autocast(self.device, config.precision):
                logits = self.model(frames)
            loss = F.cross_entropy(logits.float(), label, label_smoothing=config.label_smoothing)
            self.scaler.scale(loss / config.accumulate).backward()
            total += loss.detach() / config.accumulate
            clips += len(label)
        if _processes() > 1:
            average_over_processes(self.parameters)
            dist.all_reduce(total)
            total /= _processes()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.sums = [self.sums[0] + total, self.sums[1] + 1]
        return norm, waited, clips

    def _check_finite(self) -> None:
        if not math.isfinite(float(self.sums[0])):
            raise FloatingPointError(
                f"loss is {float(self.sums[0])} at step {self.step}; the last checkpoints are from before. "
                "A lower lr or clip_norm, or another precision, may help"
            )

    def _line(self, norm: Tensor, clips_per_second: float, wait: float) -> dict[str, float]:
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": float(self.sums[0]) / self.sums[1],
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            "clips_per_second": round(clips_per_second, 2),
            "wait": round(wait, 4),
        }
        self.sums = [0.0, 0]
        if self.output and is_first():
            with open(self.output / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        return line

    def save(self) -> None:
        """Write a checkpoint of this step, and the videos that could not be read so far."""
        self._collect_bad()
        if self.output is None or not is_first():
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state_dict(),
            "epoch": self.epoch,
            "sums": [float(self.sums[0]), self.sums[1]],
        }
        checkpoint.write_json(self.output / "bad_videos.json", self.bad)
        checkpoint.save(self.output, self.step, self.model.trainable_state_dict(), state)

    def _collect_bad(self) -> None:
        reports = [bad_videos(self.loader)]
        if _processes() > 1:
            reports = [{}] * _processes()
            dist.all_gather_object(reports, bad_videos(self.loader))
        for report in reports:
            self.bad |= report

    def _open(self, output: Path, record: dict[str, Any]) -> None:
        """Start in an empty folder, or continue the run that is there."""
        output.mkdir(parents=True, exist_ok=True)
        path = output / "config.json"
        found = checkpoint.load(output)
        if path.exists() and found:
            refuse_other_run(output, json.loads(path.read_text()), record, self.config)
        if found:
            self.step, self.epoch = found.step, found.state["epoch"]
            self.model.load_trainable_state_dict(found.weights)
            self.optimizer.load_state_dict(found.state["optimizer"])
            self.scaler.load_state_dict(found.state["scaler"])
            self.loader.load_state_dict(found.state["loader"])
            self.sums = found.state["sums"]
            with contextlib.suppress(FileNotFoundError):
                self.bad = json.loads((output / "bad_videos.json").read_text())
        if is_first():
            checkpoint.write_json(path, record)
            truncate_log(output / "log.jsonl", self.step)


def fit(
    model: VideoCLIP, loader: Any, config: FitConfig, *, record: dict[str, Any] | None = None
) -> list[dict[str, float]]:
    """Train ``model`` on ``loader`` and return the lines of the log (loss, lr, grad_norm, clips_per_second, wait).

    ``loader`` yields batches with ``frames`` (uint8 ``[B, T, H, W, 3]``) and ``label`` (``[B]``) and has ``len``,
    ``set_epoch``, ``state_dict``, ``load_state_dict`` and ``report``, as :class:`i2v_kernels.video.ClipLoader`.
    With ``config.output`` the run is saved there and the same call again continues it: same losses, same weights to
    the bit on the same machine. ``record`` is kept in ``config.json`` and has to be the same again. Under
    ``torch.distributed`` gradients are averaged over the processes.
    """
    return Trainer(model, loader, config, record).run()


def refuse_other_run(output: Path, before: dict[str, Any], now: dict[str, Any], config: FitConfig) -> None:
    """``ValueError`` naming every setting that changes the numbers and is not what ``output`` was trained with."""
    free = {item.name for item in fields(config) if item.metadata["resumable"]}
    now = json.loads(json.dumps(now))
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in before.keys() | now.keys()
        if name not in free and before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(
            f"cannot resume {output}: {'; '.join(sorted(differing))}; take another output or the old value"
        )


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines after ``step``, written between the last checkpoint and the end of the process."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with checkpoint.replacing(path) as temporary:
        temporary.write_text("".join(kept))


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _summary(line: dict[str, float]) -> str:
    return f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, {line['wait']:.0%} waiting for data"
