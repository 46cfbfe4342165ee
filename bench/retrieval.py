"""``python -m bench.retrieval``: how fast ``top_k`` goes through a store of clips, beside a plain read of the same files.

The store is made in a temporary folder. Rounds take turns: all files read one after the other into a buffer of 4 MiB, which
caches hold (read); into memory of their own size (load); and ``top_k`` with some numbers of queries. First with the files
in the system's memory, then from the disk (`--cold`): the system is asked to forget them before each. The ratio is to
"read", the faster one, and the median of the rounds' ratios. Memory is the peak of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from i2v_models.retrieval import FeatureStore, top_k
from i2v_models.retrieval.store import DTYPES

from .__main__ import machine, save
from .measure import summary

BUFFER = 4 << 20
QUERIES = (1, 4, 16)
# Not getrusage's ru_maxrss, which begins with that of the process that started this one.
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
HEADING = "files in  queries  load GB/s  read GB/s  top_k GB/s  ratio  spread        peak MiB"


def make(folder: Path, clips: int, dim: int, dtype: str) -> FeatureStore:
    """A store of random unit vectors."""
    need, free = int(1.1 * clips * dim * DTYPES[dtype].itemsize), shutil.disk_usage(folder).free
    if free < need:
        raise SystemExit(f"{folder} has {free >> 20} MiB left, the store needs {need >> 20}; see --folder")
    store = FeatureStore.create(folder / "store", dim, dtype=dtype, normalize=True)
    generator = torch.Generator().manual_seed(0)
    with store.writer() as writer:
        for first in range(0, clips, 10_000):
            count = min(10_000, clips - first)
            names = [f"videos/{clip:09d}.mp4" for clip in range(first, first + count)]
            writer.append(names, torch.randn(count, dim, generator=generator))
    return FeatureStore(store.folder)


def read(store: FeatureStore) -> None:
    buffer = memoryview(bytearray(BUFFER))
    for block in store.blocks:
        with open(store.folder / block.file, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load(store: FeatureStore, memory: memoryview) -> None:
    place = 0
    for block in store.blocks:
        with open(store.folder / block.file, "rb", buffering=0) as file:
            while place < len(memory) and (count := file.readinto(memory[place : place + (1 << 30)])):
                place += count


def forget(store: FeatureStore) -> None:
    """Ask the system to drop its copy of the files in memory."""
    for block in store.blocks:
        handle = os.open(store.folder / block.file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def peak(store: FeatureStore | None, queries: int = 1, k: int = 10) -> float:
    """MiB that a process holds at most which imports the package and searches in ``store``."""
    search = f"top_k(torch.ones({queries}, {store.dim}), FeatureStore(sys.argv[1]), {k})" if store else ""
    script = f"import sys, torch\nfrom i2v_models.retrieval import FeatureStore, top_k\n{search}\n{PEAK}"
    command = [sys.executable, "-c", script, str(store.folder if store else "")]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) / 1024


def measure(store: FeatureStore, queries: Sequence[int], k: int, rounds: int, cold: bool) -> list[dict[str, Any]]:
    """A row for each number of queries: rates in bytes of files per second, and how they compare."""
    total = sum(block.bytes for block in store.blocks)
    memory = memoryview(bytearray(total))
    calls: dict[Any, Callable[[], object]] = {"load": lambda: load(store, memory), "read": lambda: read(store)}
    for count in queries:
        asked = torch.randn(count, store.dim, generator=torch.Generator().manual_seed(count))
        calls[count] = partial(top_k, asked, store, k)
    if not cold:
        for call in calls.values():
            call()
    rates: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if cold:
                forget(store)
            rates[name].append(total / seconds(call))
    rows = []
    for count in queries:
        ratio = summary([mine / plain for mine, plain in zip(rates[count], rates["read"])])
        row = {"clips": len(store), "dim": store.dim, "dtype": store.index["dtype"], "queries": count, "cold": cold}
        row |= {"load": summary(rates["load"]).median, "read": summary(rates["read"]).median}
        row |= {"top_k": summary(rates[count]).median}
        rows.append(row | {"ratio": ratio.median, "low": ratio.low, "high": ratio.high})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.retrieval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="only this dtype (default: float16, float32)")
    parser.add_argument("--queries", type=int, action="append", help=f"only so many (default: {QUERIES})")
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="from the disk too")
    parser.add_argument("--folder", type=Path, help="where the store is made and removed (default: the system's)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args(argv)
    about, rows = machine("cpu"), []
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, load {about['load']:.1f}")
    for dtype in options.dtype or ("float16", "float32"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            store = make(Path(folder), options.clips, options.dim, dtype)
            print(f"\n{len(store)} clips of {store.dim} {dtype}, top {options.k}")
            print(HEADING)
            held = {count: peak(store, count, options.k) for count in options.queries or QUERIES}
            for cold in (False, True) if options.cold else (False,):
                for row in measure(store, list(held), options.k, options.rounds, cold):
                    row |= {"peak_mib": held[row["queries"]]}
                    rates = f"{row['load'] / 1e9:11.2f}{row['read'] / 1e9:11.2f}{row['top_k'] / 1e9:12.2f}{row['ratio']:7.0%}"
                    spread = f"({row['low']:.0%}-{row['high']:.0%})"
                    print(f"{'disk' if cold else 'memory':<9}{row['queries']:8}{rates}  {spread:<13}{row['peak_mib']:9.0f}")
                    rows.append(row)
    base = peak(None)
    rows = [row | {"import_mib": base} for row in rows]
    print(f"\na process that only imports the package: {base:.0f} MiB")
    if options.json:
        save(options.json, about, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
