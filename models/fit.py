"""The training loop: any task, any model that it can be learned by, any loader with a position to return to."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from i2v_models import checkpoint, processes, run, signals
from i2v_models.backbone import VideoCLIP
from i2v_models.batches import Clips, bad_videos, stream, valid_part
from i2v_models.config import FitConfig
from i2v_models.precision import DTYPES, autocast
from i2v_models.processes import is_first
from i2v_models.progress import Progress
from i2v_models.run import total_steps
from i2v_models.spatial import check_flash
from i2v_models.tasks import Classification, Task

LEAST_SCALE = 2.0**-16  # of the fp16 loss: below it the gradient is not too large but broken
OWN = {"output", "data", "workers", "index_cache", "device", "pretrained"}  # settings in which processes may differ


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What trains, in two groups: weight decay on matrices and kernels, none on biases, norms and embeddings."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = {name for name, parameter in named if parameter.ndim < 2 or "embedding" in name}
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


class Found(NamedTuple):
    """A process's part of a step: its share of the clips' losses over ``whole``, as is the gradient; how many of the ``clips``
    that it read were ``valid``.
    """

    loss: Any
    valid: int
    clips: int
    whole: float
    waited: float


class Elsewhere(Exception):
    """Another process has failed in this step, and will say how."""


class Trainer:
    """One run of ``fit``, step by step. Random numbers depend on (seed, step, process) alone: nothing of them
    is saved.
    """

    def __init__(
        self, model: VideoCLIP, loader: Any, config: FitConfig, record: dict[str, Any] | None = None, task: Task | None = None
    ) -> None:
        self.model, self.loader, self.config, self.task = model, loader, config, task or Classification()
        self.device = model.image_mean.device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with processes.together():
            self._check()
            self.optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
            self.steps = total_steps(config, loader)
            loader.set_epoch(0)
        self.step, self.epoch, self.stop = 0, 0, 0
        self.sums: list[Any] = [0.0, 0]  # loss and steps since the last line of the log
        self.skipped = 0  # steps that were not taken, since in fp16 their gradient overflowed
        self.faulty = torch.zeros(3, device=self.device)  # the first step that must not be kept, its loss, its norm
        self.bad: dict[str, str] = {}
        self.output = Path(config.output) if config.output else None
        self.saved: int | None = None
        self.lock: Any = None
        record = {**asdict(config), "processes": processes.count(), **self.task.record(), **(record or {})}
        if processes.count() > 1:
            self._check_others(record)
            for parameter in self.parameters:
                dist.broadcast(parameter.data, 0)
        try:
            if self.output:
                self._open(self.output, record)
        except BaseException:
            self.close()
            raise
        self.position = self._position()

    def run(self) -> list[dict[str, float]]:
        """Train to the end; the lines of the log. SIGTERM and SIGINT are obeyed after a checkpoint of the step at hand."""
        try:
            with signals.put_off() as caught, Progress(self.steps, "step", done=self.step, show=is_first()) as bar:
                log = self._run(caught, bar)
        finally:
            self.close()
        if self.stop:  # another process was told to
            raise SystemExit(128 + self.stop)
        return log

    def close(self) -> None:
        """Let another run into the output folder."""
        if self.lock is not None:
            run.let_go(self.lock)

    def _run(self, caught: Callable[[], int], bar: Progress) -> list[dict[str, float]]:
        log: list[dict[str, float]] = []
        batches = stream(self.loader, self.epoch)
        self.model.train()
        started, waited, clips = time.perf_counter(), 0.0, 0
        while self.step < self.steps and not self.stop:
            begun = self.step
            norm, wait, count = self._advance(batches, caught)
            waited, clips = waited + wait, clips + count
            if processes.count() == 1:  # several agree on it once a step, and not later
                self.stop = self.stop or caught()
            last = self.step == self.steps
            saving = self.output is not None and (last or self.stop or self.step % self.config.save_every == 0)
            logging = self.step > begun and (last or self.step % self.config.log_every == 0)
            if saving or logging:
                self._check_finite()
            if logging:
                now = time.perf_counter()
                log.append(self._line(norm, clips / (now - started), waited / (now - started)))
                started, waited, clips = now, 0.0, 0
            if self.step > begun:
                bar.update(_summary(log[-1]) if log else "")
            if saving and self.step and self.step != self.saved:
                self.save()
        if self.stop and is_first():
            kept = "nothing is kept" if self.saved is None else f"step {self.saved} of {self.steps} is saved in {self.output}"
            print(f"{signal.Signals(self.stop).name}: {kept}", file=sys.stderr, flush=True)
        if self.output is None:
            checkpoint.refuse_non_finite(self.step, self.model.trainable_state_dict(), {})
        return log

    def _advance(self, batches: Iterator[tuple[int, Any]], caught: Callable[[], int]) -> tuple[Any, float, int]:
        """One optimizer step: gradient norm before clipping, seconds waited for data, clips read by all processes.

        Loss and gradient are means over the step's valid clips, wherever they are; batches without one are passed over.
        Where a process fails nothing is changed: all of them raise or, told to stop, stay at the step before.
        """
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 4096 + processes.rank())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.steps)
        waited, seen, passed, counts, found = 0.0, 0, 0, [0], Found(0.0, 0, 0, 1.0, 0.0)
        while not any(counts):
            if passed * self.config.accumulate > len(self.loader) + self.config.accumulate:
                raise ValueError("no clip of a whole epoch is valid, so there is nothing to learn from")
            passed += 1
            error: Exception | None = None
            try:
                found = self._gradient(batches)
            except Elsewhere:
                pass
            except Exception as failure:
                error = failure
            told = processes.rows(caught(), error is not None, found.valid, found.clips)
            self.stop = max(row[0] for row in told)
            counts = [row[2] for row in told]
            waited, seen = waited + found.waited, seen + sum(row[3] for row in told)
            failed = any(row[1] for row in told)
            if failed and not self.stop:
                processes.failed(error)
            if failed or (self.stop and not any(counts)):
                self.optimizer.zero_grad(set_to_none=True)
                return 0.0, waited, 0
        total = torch.as_tensor(found.loss, device=self.device)
        total = processes.sum_over(self.parameters, total, found.whole / sum(counts), lacking=not all(counts))
        norm = self._update(total)
        self.sums = [self.sums[0] + total, self.sums[1] + 1]
        self.step += 1
        self.position = self._position()
        return norm, waited, seen

    def _gradient(self, batches: Iterator[tuple[int, Any]]) -> Found:
        """Add up the gradient of this process's part of a step."""
        loss: Any = 0.0
        valid, clips, whole, waited = 0, 0, 0.0, 0.0
        for left in reversed(range(self.config.accumulate)):
            met = False
            try:
                before = time.perf_counter()
                self.epoch, batch = next(batches)
                waited += time.perf_counter() - before
                part = valid_part(batch, self.epoch)
                outputs = self._forward(part) if len(part.label) else None
                counts = self._meet(len(part.label))
                outputs = self._joined(outputs, counts)
                met = True
                valid, clips = valid + len(part.label), clips + len(batch.label)
                if any(counts):
                    whole = whole or self.config.accumulate * sum(counts) / len(counts)
                    loss = loss + self._backward(outputs, counts, whole)
            except Exception as error:
                if not isinstance(error, Elsewhere) and (left or not met):  # where the others wait for this process
                    self._meet(0, failed=True)
                raise
        return Found(loss, valid, clips, whole or 1.0, waited)

    def _forward(self, clips: Clips) -> Any:
        with autocast(self.device, self.config.precision):
            return self.task.forward(self.model, clips, self.config)

    def _meet(self, count: int, failed: bool = False) -> list[int]:
        """How many clips the loss of a batch is of: on each process, if it pairs those of all, else on this one alone.

        ``Elsewhere`` where another process has ``failed``: none waits for it in the loss.
        """
        if not self.task.coupled:
            return [count]
        told = processes.rows(failed, count)
        if any(row[0] for row in told) and not failed:
            raise Elsewhere
        return [row[1] for row in told]

    def _joined(self, outputs: Any, counts: list[int]) -> Any:
        """What the loss of a batch is made of: of all processes, if it pairs their clips."""
        if not self.task.coupled or not any(counts):
            return outputs
        return tuple(processes.joined(x, counts) for x in outputs or self.task.nothing(self.model))

    def _backward(self, outputs: Any, counts: list[int], whole: float) -> Tensor:
        """Add the gradient of these clips as part of ``whole``; their part of the loss."""
        loss = self.task.loss(self.model, outputs, counts, self.config) / whole
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self, total: Tensor) -> Tensor:
        """Clip, step, and note whether what came of it may be kept; the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.task.stepped(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.scaler.get_scale() < scale
        self.skipped += skipped
        fine = total.isfinite() & (norm.isfinite() | (skipped and scale > LEAST_SCALE))
        this = torch.stack([torch.full_like(total, self.step + 1), total, norm.to(total.dtype)])
        self.faulty = torch.where((self.faulty[0] > 0) | fine, self.faulty, this)  # read where something is kept
        return norm

    def _check_finite(self) -> None:
        step, loss, norm = self.faulty.tolist()
        if step:
            what = f"gradient norm is {norm} (of a loss of {loss:.4g})" if math.isfinite(loss) else f"loss is {loss}"
            kept = "there is no checkpoint" if self.saved is None else f"the newest checkpoint is of step {self.saved}"
            raise FloatingPointError(
                f"{what} at step {int(step)}; {kept}. A lower lr or clip_norm, or another precision, may help"
            )

    def _line(self, norm: Any, clips_per_second: float, wait: float) -> dict[str, Any]:
        line = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": float(self.sums[0]) / self.sums[1],
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": float(norm),
            "clips_per_second": round(clips_per_second, 2),
            "wait": round(wait, 4),
        }
        if self.scaler.is_enabled():
            line |= {"grad_norm": float(norm) if math.isfinite(norm) else None, "skipped": self.skipped}
        self.sums = [0.0, 0]
        if self.output:
            path = self.output / "log.jsonl"
            processes.from_first(lambda: run.append(path, line))
        return line

    def save(self) -> None:
        """Write a checkpoint of this step, and the videos that could not be read so far."""
        self._collect_bad()
        if self.output is None:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            **self.position,
            "sums": [float(self.sums[0]), self.sums[1]],
            "skipped": self.skipped,
        }
        output = self.output

        def write() -> None:
            checkpoint.save(output, self.step, self.model.trainable_state_dict(), state)
            checkpoint.write_json(output / "bad_videos.json", self.bad)

        processes.from_first(write)
        self.saved = self.step

    def _position(self) -> dict[str, Any]:
        """Where the data stand after a whole step."""
        return {"loader": self.loader.state_dict(), "epoch": self.epoch}

    def _collect_bad(self) -> None:
        self.bad |= {path: why for report in processes.gathered(bad_videos(self.loader)) for path, why in report.items()}

    def _check(self) -> None:
        """``ValueError`` for what cannot be trained, or not here."""
        if not self.parameters:
            raise ValueError("nothing to train: no parameters here; take head='linear' or train_backbone=True")
        self.task.check(self.model)
        check_flash(self.model, DTYPES[self.config.precision])
        share = getattr(self.loader, "rank", processes.rank()), getattr(self.loader, "world_size", processes.count())
        if share != (processes.rank(), processes.count()):
            raise ValueError(
                f"the loader is for process {share[0]} of {share[1]}, this is {processes.rank()} of {processes.count()}: "
                "make it after torch.distributed is initialised"
            )

    def _check_others(self, record: dict[str, Any]) -> None:
        """``ValueError`` on all processes if one has other settings, other data or another model than the first."""
        mine = {name: value for name, value in record.items() if name not in OWN}
        mine |= {"batches": len(self.loader), "data_digest": run.data_digest(self.loader)}
        own = {id(parameter) for parameter in self.parameters}
        frozen = {name: value for name, value in self.model.named_parameters() if id(value) not in own}
        mine["frozen weights"] = run.digest(frozen)
        mine["trainable"] = [(name, list(value.shape)) for name, value in self.model.trainable_state_dict().items()]
        all_of_them = processes.gathered(mine)
        for number, other in enumerate(all_of_them):
            differing = [name for name in other.keys() | mine.keys() if other.get(name) != all_of_them[0].get(name)]
            if differing:
                texts = (f"{n} is {all_of_them[0].get(n)!r} and {other.get(n)!r}" for n in sorted(differing)[:4])
                raise ValueError(f"processes 0 and {number} differ: {'; '.join(texts)}; give all the same settings and data")

    def _open(self, output: Path, record: dict[str, Any]) -> None:
        """Start in an empty folder, or continue the run that is there: the first process's, whatever disks the others have."""

        def read() -> checkpoint.Checkpoint | None:
            self.lock = run.hold(output)
            found = checkpoint.load(output)
            checkpoint.write_json(output / "config.json", run.settle(output, record, self.config, found, self.loader))
            run.truncate_log(output / "log.jsonl", found.step if found else 0)
            return found

        found = processes.from_first(read)
        if found is None:
            return
        with processes.together():
            try:
                state = found.state
                self.step, self.epoch, self.sums = found.step, state["epoch"], state["sums"]
                self.skipped = state.get("skipped", 0)
                self.model.load_trainable_state_dict(found.weights)
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
                self.loader.load_state_dict(state["loader"])
            except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                why = error if isinstance(error, ValueError) else repr(error)
                raise ValueError(f"cannot resume {output} from step {found.step}: {why}; take another output") from error
        self.saved = self.step
        if is_first():
            with contextlib.suppress(OSError, ValueError):
                self.bad = json.loads((output / "bad_videos.json").read_text())


def fit(
    model: VideoCLIP, loader: Any, config: FitConfig, *, record: dict[str, Any] | None = None, task: Task | None = None
) -> list[dict[str, float]]:
    """Train ``model`` on ``loader`` and return the lines of the log (loss, lr, grad_norm, clips_per_second, wait).

    ``loader`` yields batches with ``frames`` (uint8 ``[B, T, H, W, 3]``), ``label`` (``[B]``) and perhaps ``valid`` (``[B]``,
    False for clips that do not count) and ``path``, and has ``len``, ``set_epoch``, ``state_dict``, ``load_state_dict`` and
    ``report``, as ``i2v_kernels.video.ClipLoader``. Loss and gradient are means over the valid clips of a step. ``task``
    is what the model learns: classes, or captions (``i2v_models.tasks.Retrieval``).

    With ``config.output`` the run is saved there and the same call again continues it: same losses, same weights to
    the bit on the same machine. ``record`` is kept in ``config.json`` and has to be the same again. Under
    ``torch.distributed`` gradients are averaged over the clips of all processes; the first one's folder counts.

    SIGTERM and SIGINT wait for the end of the step and its checkpoint. ``FloatingPointError``: a loss, a gradient or a
    weight is not finite, and nothing of it is kept; ``ValueError``: settings that cannot be, or that are not those of the
    run in ``config.output``, or another process that writes there; ``OSError``: a file cannot be written.
    """
    return Trainer(model, loader, config, record, task).run()


def _summary(line: dict[str, Any]) -> str:
    skipped = f", {line['skipped']} steps skipped by fp16" if line.get("skipped") else ""
    return f"loss {line['loss']:.3f}, {line['clips_per_second']:.1f} clips/s, {line['wait']:.0%} waiting for data{skipped}"
