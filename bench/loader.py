"""``python -m bench.loader``: clips per second of ``ClipLoader`` by backend and batch size, and what a training step waits for.

On a CPU the files are VP9, which is what DALI decodes without a GPU; on a GPU H.264. Memory is that of this process: how much
more it holds after the measured epochs than before them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from i2v_kernels.video import ClipLoader, choose_backend, decode, index, write_video
from i2v_models import build, load_clip

from .__main__ import machine, save
from .video import sample_clips, start_with_ffmpeg

BACKENDS = ("pyav", "torchcodec", "torchcodec_cuda", "dali")
BATCHES = (1, 4, 16)
FRAMES, SIZE = 8, 224
TRAINED = "ViT-B-16"


def clips(folder: Path, count: int, device: str) -> list[str]:
    """Pieces of 64 frames of the sample clip with several shots, scaled to a short side of 256."""
    (source,) = (path for path in sample_clips() if path.stem == "bikes")
    length, table = 64, index(source)
    codec = "libx264" if device == "cuda" else "libvpx-vp9"
    options = {} if device == "cuda" else {"deadline": "realtime", "cpu-used": "8"}
    paths = []
    for i in range(8):
        begin = i * (table.count - length) // 7
        path = folder / f"{i}.mp4"
        frames = decode(source, range(begin, begin + length), (256, 602), index=table)
        write_video(path, frames, 25, codec, gop=16, options=options)
        paths.append(str(path))
    return [paths[i % len(paths)] for i in range(count)]


def resident() -> float:
    """MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def throughput(backend: str, paths: list[str], batch: int, workers: int, epochs: int) -> dict[str, float]:
    """After an epoch to warm up."""
    loader = ClipLoader(
        paths, frames=FRAMES, size=SIZE, batch_size=batch, backend=backend, workers=0 if "cuda" in backend else workers
    )
    for _ in loader:
        pass
    gpu = torch.cuda.is_available()
    before = resident(), torch.cuda.mem_get_info()[0] if gpu else 0
    rates = []
    for _ in range(epochs):
        begun, seen = time.perf_counter(), 0
        for found in loader:
            seen += len(found)
        if gpu:
            torch.cuda.synchronize()
        rates.append(seen / (time.perf_counter() - begun))
    after = resident(), torch.cuda.mem_get_info()[0] if gpu else 0
    row = {"per_second": sorted(rates)[len(rates) // 2], "low": min(rates), "high": max(rates)}
    return row | {"clips": epochs * len(paths), "host_mib": after[0] - before[0], "device_mib": (before[1] - after[1]) / 2**20}


def waiting(backend: str, paths: list[str], device: str, batch: int, workers: int) -> dict[str, float]:
    """The share of a training run's time in which the step waits for clips."""
    clip, _ = load_clip(TRAINED, None)
    model = build(clip.to(device), "st_adapter", frames=FRAMES, head="linear", captions=["a", "b"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    loader = ClipLoader(
        paths, frames=FRAMES, size=SIZE, batch_size=batch, backend=backend, workers=0 if "cuda" in backend else workers
    )
    for _ in range(2):
        for found in loader:
            frames = found.frames.to(device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16):
                loss = model(frames).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
    stats = loader.stats()
    return {"per_second": stats["clips_per_second"], "waiting": stats["wait_seconds"] / stats["seconds"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this backend")
    parser.add_argument("--epochs", type=int, default=3, help="measured epochs, of 64 clips on a CPU and 512 on a GPU")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args(argv)
    about, rows = machine(options.device), []
    print(f"{about['device']}, {options.workers} workers, torch {about['torch']}, load {about['load']:.1f}\n")
    print(f"{'backend':<18}{'batch':>6}{'clips/s':>10}  {'spread':<16}{'host MiB':>9}{'device MiB':>12}{'step waits':>12}")
    with tempfile.TemporaryDirectory() as folder:
        paths = clips(Path(folder), 512 if options.device == "cuda" else 64, options.device)
        for backend in options.backend or BACKENDS:
            try:
                choose_backend(backend)
            except ImportError as reason:
                print(f"without {backend}: {reason}")
                continue
            for batch in BATCHES:
                row = throughput(backend, paths, batch, options.workers, options.epochs)
                share = ""
                if batch == 4:
                    few = paths[: 256 if options.device == "cuda" else 8]
                    step = waiting(backend, few, options.device, batch, options.workers)
                    row |= {f"step_{name}": value for name, value in step.items()}
                    share = f"{row['step_waiting']:.0%}"
                spread = f"({row['low']:.1f}-{row['high']:.1f})"
                numbers = f"{row['per_second']:10.1f}  {spread:<16}{row['host_mib']:9.0f}{row['device_mib']:12.0f}"
                print(f"{backend:<18}{batch:>6}{numbers}{share:>12}", flush=True)
                rows.append({"backend": backend, "batch": batch, **row})
    if options.json:
        save(options.json, about, rows)
    return 0


if __name__ == "__main__":
    start_with_ffmpeg(main)
