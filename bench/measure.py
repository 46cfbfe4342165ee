"""Interleaved timing: every candidate once a round, so that a disturbance meets all; medians and spread over the rounds.

A turn is a few calls that are not measured, since the first find interpreter, allocator and caches as another candidate left
them, and one that is: what ``torch.utils.benchmark`` measures in a loop over one call alone, but side by side.
"""

from __future__ import annotations

import ctypes
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch

WARM_SECONDS = 3e-3
# glibc's cache for small blocks keeps the odd rest beside a large one from being joined to it again. Outputs then take turns on
# several blocks, or stay on one that the cache holds, by chance: for one candidate and not for the next. Without it all meet
# the same block, the one freed last. It must be in the environment when the process starts: ``start`` sees to it.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def start(main: Callable[[], int]) -> NoReturn:
    """Run a bench's ``main`` as the process, begun anew with ``TUNABLES`` if it lacks them."""
    if not TUNABLES.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | TUNABLES)
    sys.exit(main())


@dataclass(frozen=True)
class Timing:
    """Milliseconds, or what else is measured a round: median, 20th and 80th percentile over the rounds."""

    median: float
    low: float
    high: float


def interleaved(
    candidates: dict[str, Callable[[], object]], device: str, seconds: float, cold: bool = False
) -> dict[str, Timing]:
    """``rounds``, summed up."""
    return {name: summary(times) for name, times in rounds(candidates, device, seconds, cold).items()}


def rounds(
    candidates: dict[str, Callable[[], object]], device: str, seconds: float, cold: bool = False
) -> dict[str, list[float]]:
    """Time each candidate for about ``seconds`` altogether, at least 7 rounds; on a GPU by events around 10 launches.
    ``cold`` leaves the calls out that are not measured (on a CPU; launches on a GPU wait in its queue and are never cold).
    """
    _keep_freed_memory()
    once = _once_on_gpu if device == "cuda" else partial(_once_on_cpu, cold=cold)
    for call in candidates.values():
        call()
        call()
    begun = time.perf_counter()
    for call in candidates.values():
        once(call)
    count = int(min(max(seconds / (time.perf_counter() - begun), 7), 200))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    shuffle = random.Random(0).shuffle  # no candidate is always the one after the same other
    names = list(candidates)
    for _ in range(count):
        shuffle(names)
        for name in names:
            times[name].append(once(candidates[name]))
    return times


def copy_ceiling(traffic: int, device: str, seconds: float = 1.0) -> float:
    """Bytes per second, read plus written, of a copy that moves as many: what a memory-bound op can reach. The size matters,
    since small tensors are copied within the caches.
    """
    source = torch.randint(0, 256, (traffic // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    return 2 * source.numel() / timing.median * 1e3


def product_ceiling(dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large product by the library: what an op made of products can reach. Of random
    numbers: a GPU multiplies ones faster.
    """
    rows, size = (4096, 1024) if device == "cpu" else (32768, 8192)
    a, b = torch.randn(rows, size, dtype=dtype, device=device), torch.randn(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    timing = interleaved({"product": lambda: torch.mm(a, b, out=out)}, device, seconds)["product"]
    return 2 * rows * size * size / timing.median * 1e3


def _keep_freed_memory() -> None:
    """Have glibc give no freed memory back: page faults at the next call's output would cost more than any op here. See also
    ``TUNABLES``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    return Timing(statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5])


def _once_on_cpu(call: Callable[[], object], cold: bool) -> float:
    end = time.perf_counter() + (0.0 if cold else WARM_SECONDS)
    while time.perf_counter() < end:
        call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _once_on_gpu(call: Callable[[], object], launches: int = 10) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1_000_000)  # the launches queue behind it: the gaps between them are not measured
    start.record()
    for _ in range(launches):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / launches


class Queued:
    """Times launches that wait in the device's queue until all of them are there, so that the host's share is not in their
    time; that share is the time which queueing them took. ``call`` takes the number of the launch, to rotate its inputs.
    """

    LONGEST = 2_000_000_000  # cycles that the device may be kept asleep: about a second

    def __init__(self, call: Callable[[int], object], device: str) -> None:
        self.call, self.device = call, device
        self.cycles, self.first, self.waited = 2_000_000, 0, True
        self.launches = 1

    def once(self) -> tuple[float, float]:
        """Microseconds a launch: on the device, and on the host."""
        if self.device != "cuda":
            begun = time.perf_counter()
            self._queue()
            us = (time.perf_counter() - begun) / self.launches * 1e6
            return us, us
        while True:
            torch.cuda.synchronize()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self.cycles)
            start.record()
            begun = time.perf_counter()
            self._queue()
            host = time.perf_counter() - begun
            self.waited = not start.query()  # the device still slept when the last launch was queued
            stop.record()
            stop.synchronize()
            if self.waited or self.cycles >= self.LONGEST:
                return start.elapsed_time(stop) * 1e3 / self.launches, host * 1e6 / self.launches
            self.cycles = min(max(4 * self.cycles, int(4e9 * host)), self.LONGEST)

    def _queue(self) -> None:
        for _ in range(self.launches):
            self.call(self.first)
            self.first += 1
