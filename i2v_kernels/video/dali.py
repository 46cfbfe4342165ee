"""The backend ``dali``: NVIDIA DALI decodes, scales, crops and mirrors a batch of clips at once, on the GPU where there is one.

DALI is told which frames, by the plans that every decoder gets, and it is given only files that it decodes exactly so: what
`why_not` names goes through PyAV, in the same batch. An error that DALI raises all the same ends its pipeline: another is
built, the batch is asked for again clip by clip, and the clip at fault goes through PyAV from then on.
"""

from __future__ import annotations

import copy
import ctypes
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from .errors import VideoError, import_av
from .plan import Entry, Request
from .pyav import OverPyAV
from .reader import ClipPlan, ClipReader, Outcome, Result
from .types import Size, StrPath, VideoIndex

MAX_BYTES = 256 << 20  # of a file, which is in memory as a whole

# codec -> least and greatest side that it is decoded at. NVDEC: NVIDIA Video Codec SDK, support matrix.
NVDEC = {
    "h264": (64, 4096), "hevc": (144, 8192), "vp8": (64, 4096), "vp9": (128, 8192), "av1": (128, 8192),
    "mpeg4": (64, 1024), "mjpeg": (64, 8192),
}  # fmt: skip
CPU = {"vp8": (1, 16384), "vp9": (1, 16384), "mjpeg": (1, 16384)}  # what DALI 2.1 and later decode without a GPU
TEN_BITS = {"hevc", "vp9", "av1"}
BT601, FULL = {2, 5, 6}, 2  # the colours that DALI takes all files for, as `VideoIndex` numbers them; 2 is "not told"
_FAILURES = (RuntimeError, IndexError, ValueError)  # what DALI raises when a pipeline ends


def why_not(index: VideoIndex, device: str) -> str | None:
    """Why a file with this index is decoded by PyAV, or None if DALI on ``device`` ("cpu" or "cuda") takes it."""
    limits = (NVDEC if device == "cuda" else CPU).get(index.codec)
    low, high = min(index.width, index.height), max(index.width, index.height)
    if limits is None:
        return f"codec {index.codec}"
    if index.damage is not None or index.counted is not None:
        return index.damage or "frames cannot be found by their times"
    if index.skipped:
        return f"{index.skipped} packets are not to be shown"
    if index.streams > 1:
        return f"{index.streams} video streams"
    if index.color_space not in BT601 or (index.color_range == FULL and index.codec != "mjpeg"):
        return f"colours other than BT.601 of 16 to 235 (matrix {index.color_space}, range {index.color_range})"
    if not (index.pix_fmt in ("yuv420p", "yuvj420p") or (index.pix_fmt == "yuv420p10le" and index.codec in TEN_BITS)):
        return f"pixel format {index.pix_fmt}"
    if low < limits[0] or high > limits[1] or (device == "cuda" and (low % 2 or high % 2)):
        return f"size {index.width} x {index.height}"
    return None


def why_no_dali() -> str | None:
    """Why DALI cannot be used at all, or None."""
    try:
        import_av()  # which finds the frames
        require("nvidia.dali", "decoding with DALI")
    except ImportError as error:
        return str(error)
    return None


@cache
def best_device() -> str:
    """ "cuda", or "cpu" where there is no GPU or, with a warning, no NVDEC."""
    if not torch.cuda.is_available():
        return "cpu"
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        text = "libnvcuvid.so.1 is missing, so videos are decoded on the CPU; in a container, ask for the driver capability"
        warnings.warn(f"{text} 'video'", RuntimeWarning, stacklevel=2)
        return "cpu"
    return "cuda"


class Job(NamedTuple):
    """A clip for DALI, in the file's own orientation: DALI does not turn frames."""

    path: str
    indices: list[int]
    size: tuple[int, int]
    corner: tuple[int, int]
    shape: tuple[int, int]
    flip: bool
    turns: int  # quarters, counter-clockwise, afterwards

    @classmethod
    def of(cls, plan: ClipPlan, shape: tuple[int, int]) -> Job:
        (height, width), (top, left), turns = plan.size, plan.corner, plan.table.rotation // 90
        if plan.table.mirrored:
            left = width - left - shape[1]
        bottom, right = height - top - shape[0], width - left - shape[1]
        size, shape = ((height, width), shape) if turns % 2 == 0 else ((width, height), shape[::-1])
        corner = ((top, left), (left, bottom), (bottom, right), (right, top))[turns]
        return cls(plan.path, plan.indices, size, corner, shape, plan.flip != plan.table.mirrored, turns)

    def finished(self, frames: Tensor) -> Tensor:
        if self.turns:
            frames = torch.rot90(frames, self.turns, (1, 2))
        return frames.flip(2) if self.flip and self.turns else frames


class Pipe:
    """A DALI pipeline of batches of at most ``size`` jobs, whose clips have one shape."""

    def __init__(self, size: int, device: str) -> None:
        fn, types, pipeline = (require(f"nvidia.dali.{name}", "decoding with DALI") for name in ("fn", "types", "pipeline"))
        gpu = torch.cuda.current_device() if device == "cuda" else None
        threads = max(1, len(os.sched_getaffinity(0)))
        self.pipeline = pipeline.Pipeline(
            batch_size=size, num_threads=threads, device_id=gpu, prefetch_queue_depth=1, exec_dynamic=True
        )  # of a greater depth, its first run would ask for as many batches
        kinds = {"data": (1, types.UINT8), "frames": (1, types.INT32), "size": (1, types.FLOAT), "corner": (1, types.INT32)}
        kinds |= {"shape": (1, types.INT32), "flip": (0, types.INT32)}
        with self.pipeline:
            given = {name: fn.external_source(name=name, ndim=ndim, dtype=dtype) for name, (ndim, dtype) in kinds.items()}
            video = fn.decoders.video(
                given["data"], device="mixed" if gpu is not None else "cpu", frames=given["frames"], pad_mode="none"
            )
            video = fn.resize(video, size=given["size"], interp_type=types.INTERP_LINEAR, antialias=True)
            video = fn.slice(video, given["corner"], given["shape"], axes=(1, 2))
            self.pipeline.set_outputs(fn.flip(video, horizontal=given["flip"]))
        self.pipeline.build()
        self.size = size
        self.on_gpu = gpu is not None

    def submit(self, jobs: Sequence[Job], data: Sequence[np.ndarray]) -> None:
        columns: dict[str, list[Any]] = {
            "data": list(data),
            "frames": [np.array(job.indices, np.int32) for job in jobs],
            "size": [np.array(job.size, np.float32) for job in jobs],
            "corner": [np.array(job.corner, np.int32) for job in jobs],
            "shape": [np.array(job.shape, np.int32) for job in jobs],
            "flip": [np.array(job.flip and not job.turns, np.int32) for job in jobs],
        }
        for name, values in columns.items():
            self.pipeline.feed_input(name, values)
        self.pipeline.schedule_run()

    def collect(self) -> Tensor:
        """``[jobs, T, *shape, 3]`` of the batch that was submitted first."""
        stream = torch.cuda.current_stream() if self.on_gpu else None
        (outputs,) = self.pipeline.share_outputs(cuda_stream=stream)
        frames = torch.from_dlpack(outputs.as_tensor())  # it owns the memory from here on: the executor is the dynamic one
        self.pipeline.release_outputs()
        return frames


@dataclass
class Prepared:
    """A request whose plans are made, files read, and other clips decoded by PyAV."""

    request: Request
    outcomes: dict[Entry, Outcome]
    jobs: dict[Entry, tuple[ClipPlan, Job]]
    data: dict[str, np.ndarray]
    bad: list[tuple[str, str]]
    pipe: Pipe | None = None  # where the jobs are


class DaliDecoder(OverPyAV):
    """Decodes with DALI where it is exact, else with PyAV.

    Args:
        device: "cuda" (NVDEC), "cpu" (VP8, VP9 and MJPEG alone), or None for the best there is.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device = device
        self._refused: set[tuple[str, int]] = set()
        self._pipe: Pipe | None = None  # of single clips
        self._lock = Lock()

    @property
    def device(self) -> str:
        return self._device or best_device()

    def __reduce__(self) -> Any:
        return DaliDecoder, (self._device,)

    def exact(self, path: StrPath, wanted: list[int], size: Size, table: VideoIndex) -> Tensor | None:
        shape = table.output_size(size)
        plan = ClipPlan(os.fspath(path), table, wanted, shape, (0, 0), False, None)
        return self.alone(Job.of(plan, shape), np.fromfile(path, np.uint8)) if self.takes(plan) else None

    def results(self, reader: ClipReader, requests: Iterator[Request], threads: int, prefetch: int) -> Iterator[Result]:
        """The batches of ``requests``, in order; ``threads`` read files ahead, and decode what DALI does not take."""
        waiting: deque[Future[Prepared]] = deque()
        batches = Batches(self, reader)
        begun: Prepared | None = None  # in the pipeline, while the batch before it is used
        with ThreadPoolExecutor(max(1, threads), "i2v-dali") as pool:
            try:
                while True:
                    for request in islice(requests, prefetch + 1 - len(waiting)):
                        waiting.append(pool.submit(batches.prepare, request))
                    ended = None
                    if begun is not None:
                        ended, begun = batches.finish(begun), None
                    if waiting:
                        begun = waiting.popleft().result()
                        batches.submit(begun)
                    if ended is not None:
                        yield ended
                    elif begun is None:
                        return
            finally:
                for future in waiting:
                    future.cancel()

    def takes(self, plan: ClipPlan) -> bool:
        status = os.stat(plan.path)
        if status.st_size > MAX_BYTES or (plan.path, status.st_mtime_ns) in self._refused:
            return False
        return why_not(plan.table, self.device) is None

    def alone(self, job: Job, data: np.ndarray) -> Tensor | None:
        """One clip in a pipeline of its own; None where DALI fails, which it is then not asked again."""
        with self._lock:
            try:
                self._pipe = self._pipe or Pipe(1, self.device)
                self._pipe.submit([job], [data])
                return job.finished(self._pipe.collect()[0])
            except _FAILURES:
                self._pipe = None
                self._refused.add((job.path, os.stat(job.path).st_mtime_ns))
                return None


class Batches:
    """The batches of one iteration, and its pipeline."""

    def __init__(self, decoder: DaliDecoder, reader: ClipReader) -> None:
        self.decoder, self.reader = decoder, reader
        self.pipe: Pipe | None = None

    def prepare(self, request: Request) -> Prepared:
        """In a thread of its own, and so with a reader of its own."""
        reader, prepared = copy.copy(self.reader), Prepared(request, {}, {}, {}, [])
        for entry in request.entries:
            try:
                plan = reader.plan(entry, request.epoch)
                if self.decoder.takes(plan):
                    if plan.path not in prepared.data:
                        prepared.data[plan.path] = np.fromfile(plan.path, np.uint8)
                    prepared.jobs[entry] = plan, Job.of(plan, (reader.size, reader.size))
                    continue
            except (VideoError, OSError):
                pass  # PyAV tells the reason, and finds its stand-in
            prepared.outcomes[entry] = reader.outcome(entry, request.epoch, prepared.bad)
        return prepared

    def submit(self, prepared: Prepared) -> None:
        if not prepared.jobs:
            return
        jobs = [job for _, job in prepared.jobs.values()]
        try:
            if self.pipe is None or self.pipe.size < len(jobs):
                self.pipe = Pipe(len(prepared.request.entries), self.decoder.device)
            prepared.pipe = self.pipe
            prepared.pipe.submit(jobs, [prepared.data[job.path] for job in jobs])
        except _FAILURES:
            self.pipe = prepared.pipe = None

    def finish(self, prepared: Prepared) -> Result:
        request, outcomes = prepared.request, prepared.outcomes
        frames = self.collect(prepared)
        for entry, (plan, _) in prepared.jobs.items():
            if entry in frames:
                outcomes[entry] = Outcome(entry.item, plan, frames[entry])
            else:
                outcomes[entry] = self.reader.outcome(entry, request.epoch, prepared.bad)
        return self.reader.batch(request, [outcomes[entry] for entry in request.entries], prepared.bad)

    def collect(self, prepared: Prepared) -> dict[Entry, Tensor]:
        """The clips of a batch; one is missing where DALI failed."""
        try:
            if prepared.pipe is not None:
                frames = prepared.pipe.collect()
                return {entry: job.finished(clip) for (entry, (_, job)), clip in zip(prepared.jobs.items(), frames)}
        except _FAILURES:
            self.pipe = None
        found = {e: self.decoder.alone(job, prepared.data[job.path]) for e, (_, job) in prepared.jobs.items()}
        return {entry: clip for entry, clip in found.items() if clip is not None}
