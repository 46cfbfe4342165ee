"""Batches of clips from folders, CSV files and lists: deterministic, sharded, resumable, not stopped by bad files."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from .backends import choose_backend
from .batch import Batch, Report
from .errors import VideoError, shown
from .plan import Plan, Request
from .pool import Pool, Stalled
from .reader import ClipReader, Result
from .sampling import Sampler, draw, get_sampler
from .sources import read_sources
from .types import StrPath


class ClipLoader:
    """Iterate over one epoch of clips: ``for batch in loader: model(batch.frames.to(device))``.

    The order depends on (seed, epoch) only, and what is sampled from a video on (seed, epoch, video, view) only: not on
    ``workers``, nor on what was read before. All ranks see the same number of batches, and the clips that they see in
    one step are, together, the same for any number of ranks with the same global batch size. One iteration at a time.

    Args:
        sources: a folder with one folder of videos per class; one video; a list in a file (CSV: path, label, caption); or a
            list of paths or (path, label[, caption]). Labels are all whole numbers, or all names, which are numbered in
            sorted order. See "Sources" in this package's README for headers, delimiters, encodings, and what is left out.
        frames: T, frames per clip.
        sampling: a name from `SAMPLERS`, or a function of that kind. ``"tsn_train"`` is the usual choice for training.
        size: frames are scaled to this short side and cropped to ``size x size``.
        batch_size: clips per batch on this rank.
        workers: worker processes, each with one decoder thread; they live as long as the loader. 0: decode in this one.
        shuffle: a new order each epoch; call `set_epoch`.
        seed: not negative.
        backend: decoder, see `register_backend`. The choice and its reason are in ``loader.backend``.
        on_error: what to do about a video that cannot be read: ``"replace"`` shows the next good one of the list in its
            place, flagged in ``valid`` (11 bad ones in a row are an error); ``"raise"`` raises its VideoError;
            ``"skip"`` leaves it out, so that batches get smaller and an entirely bad batch is missing on its rank: not
            for training where ranks wait for each other. Files that decode only in part are used as far as they go.
            `report` names them all.
        rank, world_size: this process's share; from torch.distributed if it is initialised, else 0 and 1. Shares are
            made equal by repeats, flagged in ``valid``.
        views: (temporal, spatial) views per video, each a clip of its own, in the order of ``batch.view``. Temporal
            views are the sampler's clips; spatial views are 1 (centre) or 3 (spread along the long side).
        drop_last: drop the last step if it is not full on all ranks, instead of a smaller batch.
        pin_memory: batches in pinned memory (if there is a GPU).
        prefetch: batches each worker prepares ahead.
        multiprocessing_context: how workers start: "fork", "spawn", "forkserver", or None for Python's default.
        crop: "center" (or the spatial view's), or "random": another square of the scaled frames each epoch.
        flip: mirror half of the clips, others each epoch. Not for data where left and right matter, as in Something-Something.
        index_cache: a file that keeps the videos' indices between runs, see `IndexCache`; many loaders may share it.
        progress: keep a line on stderr: batches, clips per second, the share of time spent waiting, bad files, time left.
        stall_seconds: workers that give no batch for so long are a TimeoutError that names the files; 0: wait for ever.

    Attributes:
        videos: list of `Video` (path, label, caption).
        classes: their names, empty if labels are numbers or absent.
        left_out: what lies in the folder and is not used, (path, kind, reason, files); warned of when the loader is made, and
            in `report` where it looks like a video, as a link to a file that is not there.
        epoch: as set by `set_epoch`.
        backend: (name, reason).

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument is not as above.
        ImportError: no decoder is installed.
        VideoError: while iterating, see ``on_error``.
        TimeoutError: while iterating, see ``stall_seconds``.
        RuntimeError: while iterating: a worker process died, at once and each time; the next iteration starts new ones.
    """

    def __init__(
        self,
        sources: Any,
        *,
        frames: int = 8,
        sampling: str | Sampler = "tsn_test",
        size: int = 224,
        batch_size: int = 8,
        workers: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        backend: str = "auto",
        on_error: str = "replace",
        rank: int | None = None,
        world_size: int | None = None,
        views: tuple[int, int] = (1, 1),
        drop_last: bool = False,
        pin_memory: bool = False,
        prefetch: int = 2,
        multiprocessing_context: str | None = None,
        crop: str = "center",
        flip: bool = False,
        index_cache: StrPath | None = None,
        stall_seconds: float = 600.0,
        progress: bool = False,
    ) -> None:
        least = {"frames": (frames, 1), "size": (size, 1), "batch_size": (batch_size, 1), "prefetch": (prefetch, 1)}
        for name, (value, low) in (least | {"workers": (workers, 0), "seed": (seed, 0)}).items():
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")
        if isinstance(stall_seconds, bool) or not isinstance(stall_seconds, (int, float)) or not stall_seconds >= 0:
            raise ValueError(f"stall_seconds must be a number of at least 0, got {stall_seconds!r}")
        if on_error not in ("replace", "skip", "raise"):
            raise ValueError(f"on_error must be 'replace', 'skip' or 'raise', got {on_error!r}")
        if len(views) != 2 or views[0] < 1 or views[1] not in (1, 3):
            raise ValueError(f"views must be (temporal >= 1, spatial 1 or 3), got {views!r}")
        sampler = get_sampler(sampling)
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be 'center' or 'random', got {crop!r}")
        if crop == "random" and views[1] != 1:
            raise ValueError(f"crop='random' has no spatial views, got views={views!r}")
        found = draw(sampler, np.arange(1000) / 25, frames, np.random.default_rng(seed), 0, views[0])
        if len(found) != frames:
            raise ValueError(f"sampling={sampling!r} gave {len(found)} frames, asked for frames={frames}")
        rank, world_size = _share(rank, world_size)
        self.videos, self.classes, self.left_out = read_sources(sources)
        name, decoder, reason = choose_backend(backend)
        self.backend = name, reason
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self._plan = Plan(len(self.videos), views[0] * views[1], batch_size, shuffle, seed, drop_last, rank, world_size)
        self._pin = pin_memory and torch.cuda.is_available()
        self._start = self._position = self._iteration = 0
        self._report = Report({one.path: (one.reason, 1) for one in self.left_out if one.reason})
        self._clips, self._seconds, self._waited = 0, 0.0, 0.0
        self._reader = ClipReader(
            self.videos, decoder, sampler, frames, size, (views[0], views[1]), seed, on_error, crop, flip, index_cache
        )
        self._workers, self._prefetch, self._stall, self._progress = workers, prefetch, stall_seconds, progress
        self._told = time.monotonic()
        self._pool: Pool | None = None
        if workers and not hasattr(decoder, "results"):
            finish = _pinned if self._pin else None
            self._pool = Pool(self._reader, self._plan, workers, prefetch, multiprocessing_context, stall_seconds, finish)
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        """Say that an epoch has no batch, or that this rank sees repeats alone."""
        plan = self._plan
        clips, step = plan.videos * plan.views, plan.batch_size * plan.world_size
        told = f"{clips} clips ({plan.videos} videos), batch_size={plan.batch_size}, world_size={plan.world_size}"
        if len(self) == 0:
            text = f"drop_last=True leaves out what does not fill a step of {step} clips; {told}"
            warnings.warn(f"ClipLoader: an epoch has no batch: {text}", stacklevel=3)
        elif plan.rank >= clips:
            text = f"ClipLoader: rank {plan.rank} has no clip of its own, only repeats (valid is False); {told}"
            warnings.warn(text, stacklevel=3)

    def __len__(self) -> int:
        """Batches per epoch, on every rank."""
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        self._iteration += 1
        iteration, self._position = self._iteration, self._start
        self._clips, self._seconds, self._waited = 0, 0.0, 0.0
        decoder: Any = self._reader.decoder
        results: Iterator[Result]
        if hasattr(decoder, "results"):
            results = decoder.results(self._reader, self.plan(self._start), self._workers, self._prefetch)
        elif self._pool is None:
            results = map(self._reader.__getitem__, self.plan(self._start))
        else:
            results = self._pool.results(self.epoch, self._start)
        self._start = 0
        return self._batches(results, iteration)

    def _batches(self, results: Iterator[Result], iteration: int) -> Iterator[Batch]:
        begun, first = time.perf_counter(), self._position
        while True:
            if iteration != self._iteration:
                raise RuntimeError("ClipLoader: a newer iteration over this loader has begun; it has one at a time")
            asked = time.perf_counter()
            try:
                result = next(results, None)
            except Stalled:
                raise TimeoutError(self._stalled()) from None
            self._seconds, self._waited = time.perf_counter() - begun, self._waited + time.perf_counter() - asked
            if self._progress:
                self._tell(self._position if result else len(self))
            if result is None:
                if self._clips == 0 and self._position == len(self) > first:
                    reasons = f"bad files: {len(self._report)}, see report()"
                    warnings.warn(f"ClipLoader: epoch {self.epoch} gave no batch at all, {reasons}", stacklevel=2)
                self._position = len(self)
                return
            for path, reason in result.bad:
                self._report.add(path, reason)
            if result.error is not None:
                # A copy: the error's traceback holds this frame, and this frame must not hold the error: a cycle
                # would keep the workers until the garbage collector comes by.
                raise VideoError(*result.error.args)
            self._position = result.number + 1
            if result.fields is not None:
                tensors = {k: torch.from_numpy(v) for k, v in result.fields.items() if isinstance(v, np.ndarray)}
                batch = Batch(**(result.fields | tensors))
                self._clips += len(batch)
                yield batch.pin_memory() if self._pin else batch

    def _tell(self, done: int) -> None:
        now, last, watched = time.monotonic(), done == len(self), sys.stderr.isatty()
        if not last and now - self._told < (0.2 if watched else 10.0):  # a file gets lines, not one that grows
            return
        self._told, stats = now, self.stats()
        waiting = stats["wait_seconds"] / stats["seconds"] if stats["seconds"] else 0.0
        left = stats["seconds"] / done * (len(self) - done) if done else 0.0
        speed = f"{stats['clips_per_second']:.1f} clips/s, {waiting:.0%} waiting, {stats['bad_files']} bad files"
        text = f"epoch {self.epoch}: {done} of {len(self)} batches, {speed}, {left:.0f} s left "
        print(f"\r{text}" if watched else text, end="" if watched and not last else "\n", file=sys.stderr, flush=True)

    def _stalled(self) -> str:
        request = next(self.plan(self._position), None)
        names = [shown(self.videos[entry.item].path) for entry in request.entries] if request else []
        return (
            f"ClipLoader: no batch for {self._stall:g} s (stall_seconds). The next is number {self._position} of epoch "
            f"{self.epoch}, of {', '.join(names)}. If these files are merely slow to read, allow more."
        )

    def plan(self, start: int = 0) -> Iterator[Request]:
        """What batches ``start``, ``start + 1``, ... of this epoch are made of, on this rank."""
        return self._plan.requests(self.epoch, start)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, which starts at its first batch (or where `load_state_dict` said)."""
        if not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"set_epoch: epoch must be an int of at least 0, got {epoch!r}")
        if epoch != self.epoch:
            self.epoch, self._start, self._position = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and position, the number of batches of it yielded so far; the same on every rank."""
        return {"epoch": self.epoch, "position": self._position, "plan": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration yield exactly the batches that had not been yielded when ``state`` was taken.

        A state taken at the end of an epoch gives an iteration without batches: go on with ``set_epoch(epoch + 1)``.

        Raises:
            ValueError: the state is of a loader with other videos or settings.
        """
        here = self._fingerprint()
        changed = [f"{k}: {state['plan'].get(k)} -> {here[k]}" for k in here if state["plan"].get(k) != here[k]]
        if changed:
            raise ValueError(f"load_state_dict: the loader is not the one that was saved: {', '.join(changed)}")
        self.epoch, self._start, self._position = state["epoch"], state["position"], state["position"]

    def _fingerprint(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self._plan).items() if name != "rank"}

    def report(self) -> Report:
        """The bad files met so far, in all epochs, those met by workers too."""
        return self._report

    def stats(self) -> dict[str, float]:
        """Of the current or last iteration: ``clips``, ``seconds``, ``clips_per_second``, ``wait_seconds`` (the time
        spent waiting for data); and ``bad_files`` so far."""
        return {
            "clips": self._clips,
            "seconds": self._seconds,
            "clips_per_second": self._clips / self._seconds if self._seconds else 0.0,
            "wait_seconds": self._waited,
            "bad_files": len(self._report),
        }


def _pinned(result: Result) -> Result:
    """With its frames, nearly all of it, in pinned memory."""
    if result.fields is None:
        return result
    return result._replace(fields=result.fields | {"frames": result.fields["frames"].pin_memory()})


def _share(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size go together, got rank={rank}, world_size={world_size}")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..world_size - 1, got rank={rank}, world_size={world_size}")
    return rank, world_size
