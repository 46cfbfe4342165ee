"""Tiny open_clip models with seeded random weights; nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from open_clip.model import CLIP

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def tiny_clip(seed: int = 0, **vision) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(embed_dim=32, vision_cfg={**VISION, **vision}, text_cfg=TEXT)


def two_processes(script: Path, folder: Path) -> Path:
    """``script RANK FOLDER`` as two processes, to their end; the folder."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, str(script), str(rank), str(folder)], env=environment) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    return folder


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clip_model() -> CLIP:
    return tiny_clip()


@pytest.fixture
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class ClipList:
    """A loader over random clips in memory, with the interface that ``fit`` asks of ``ClipLoader``."""

    def __init__(self, count: int = 12, batch_size: int = 4, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.label = torch.arange(count) % 2
        self.frames = torch.randint(0, 128, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
        self.frames[self.label == 1, :2] += 100  # class 1 is bright first, class 0 is bright last
        self.frames[self.label == 0, 2:] += 100
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.epoch, self.yielded = 0, 0

    def __len__(self) -> int:
        return len(self.label) // (self.batch_size * self.world_size)

    def __iter__(self):
        order = torch.randperm(len(self.label), generator=torch.Generator().manual_seed(self.seed * 1000 + self.epoch))
        while self.yielded < len(self):
            first = (self.yielded * self.world_size + self.rank) * self.batch_size
            rows = order[first : first + self.batch_size]
            self.yielded += 1
            yield self.batch(rows)
        self.yielded = 0

    def batch(self, rows: torch.Tensor, valid: torch.Tensor | None = None) -> SimpleNamespace:
        path = [f"{row}.mp4" for row in rows.tolist()]
        valid = torch.ones(len(rows), dtype=torch.bool) if valid is None else valid
        return SimpleNamespace(frames=self.frames[rows], label=self.label[rows], item=rows, path=path, valid=valid)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.yielded = epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.yielded = state["epoch"], state["batches"]

    def report(self) -> SimpleNamespace:
        return SimpleNamespace(bad={f"broken_{self.rank}.mp4": ("no video stream", 1)})
