"""DALI is given the same plans as PyAV: the same frames, sizes, crops and flips, in colours that differ a little.

Without a GPU DALI decodes VP8, VP9 and MJPEG; the code that a GPU runs is the same but for the device.
"""

from __future__ import annotations

import itertools
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from i2v_kernels.video import ClipLoader, decode, index
from i2v_kernels.video import dali as backend

from .clips import coded_frames, encode, read_number
from .test_exact import FILES, make

pytest.importorskip("nvidia.dali")
DALI_FILES = {"vp9", "vp9 odd size", "mjpeg"}
VP9 = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}


def distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, int]:
    """Mean and greatest difference in grey levels."""
    apart = (a.int() - b.int()).abs()
    return apart.float().mean().item(), int(apart.max())


@pytest.mark.parametrize("kind", FILES)
def test_same_frames_as_pyav(kind: str, tmp_path: Path, by_pyav: list[Path]) -> None:
    path, count = make(tmp_path, kind)
    table = index(path)
    wanted = random.Random(1).choices(range(count), k=9)
    for size in (None, (48, 40), 33):
        clip = decode(path, wanted, size, backend="dali")
        assert by_pyav == ([] if kind in DALI_FILES else [path])
        by_pyav.clear()
        assert [read_number(frame) for frame in clip] == wanted
        mean, most = distance(clip, decode(path, wanted, size, index=table))
        assert (mean <= 2 and most <= 4) if kind in DALI_FILES else most == 0
        by_pyav.clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", sorted(set(FILES) - {"one frame"}))
def test_nvdec_gives_the_same_frames(kind: str, tmp_path: Path, by_pyav: list[Path]) -> None:
    """At a size that NVDEC takes; what it does not goes through PyAV, and is right too."""
    name, how = FILES[kind]
    how = {key: value for key, value in how.items() if key != "size"}
    path = encode(tmp_path / name, coded_frames(50, 256, 384), **how)
    table = index(path)
    wanted = random.Random(1).choices(range(50), k=9)
    for size in (None, (160, 120), 100):
        clip = decode(path, wanted, size, index=table, backend="dali")
        assert (by_pyav == []) == (backend.why_not(table, backend.best_device()) is None)
        assert [read_number(frame) for frame in clip.cpu()] == wanted
        by_pyav.clear()
        mean, most = distance(clip.cpu(), decode(path, wanted, size, index=table))
        assert mean <= 2 and most <= 16
        by_pyav.clear()


def test_rotated_files(tmp_path: Path, by_pyav: list[Path]) -> None:
    for rotation in (0, 90, 180, 270):
        path = encode(tmp_path / f"{rotation}.mp4", coded_frames(12, 48, 96), rotation=rotation, **VP9)
        assert index(path).rotation == rotation
        assert [read_number(frame) for frame in decode(path, [11, 2], backend="dali")] == [11, 2]
        assert decode(path, [3], (20, 30), backend="dali").shape == (1, 20, 30, 3)
    assert by_pyav == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that DALI takes, rotated ones among them; one of another codec; bad ones."""
    folder = tmp_path_factory.mktemp("dali")
    for i, rotation in enumerate((0, 90, 180, 270)):
        encode(folder / f"{i}.mp4", coded_frames(30, 48, 96), rotation=rotation, **VP9)
    encode(folder / "4.avi", coded_frames(30, 96, 48), "mjpeg", pix_fmt="yuvj420p")
    encode(folder / "5.mp4", coded_frames(30, 48, 96))
    (folder / "6.webm").write_bytes(b"nothing" * 100)
    torn = bytearray((folder / "0.mp4").read_bytes())
    torn[len(torn) // 2 : len(torn) // 2 + 200] = b"\xff" * 200
    (folder / "7.mp4").write_bytes(torn)
    return folder


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"batch_size": 3, "views": (2, 3)},
        {"sampling": "tsn_train", "shuffle": True, "crop": "random", "flip": True},
        {"on_error": "skip"},
        {"drop_last": True, "rank": 1, "world_size": 2, "batch_size": 1},
    ],
    ids=str,
)
def test_loader_gives_the_batches_of_pyav(how: dict, folder: Path) -> None:
    """But for colours; bad files are replaced and named the same, and cost no other clip."""
    how = {"frames": 4, "size": 32, "batch_size": 4} | how
    videos = sorted(folder.iterdir())
    loaders = [ClipLoader(videos, backend=name, workers=workers, **how) for name, workers in (("dali", 2), ("pyav", 0))]
    for epoch in range(2):
        for loader in loaders:
            loader.set_epoch(epoch)
        pairs = list(zip(*loaders, strict=True))
        for found, expected in pairs:
            for name in ("frame_index", "pts", "label", "item", "view", "valid"):
                assert torch.equal(found[name], expected[name]), name
            assert found.path == expected.path
            for mine, theirs, path in zip(found.frames, expected.frames, found.path):
                mean, most = distance(mine, theirs)
                assert (mean <= 2 and most <= 4) if Path(path).stem in "01234" else most == 0
    assert loaders[0].report().bad == loaders[1].report().bad


def test_stops_and_goes_on(folder: Path) -> None:
    videos = sorted(folder.glob("[0-5].*"))
    make_loader = lambda: ClipLoader(videos, backend="dali", frames=4, size=32, batch_size=2, shuffle=True, workers=1)  # noqa: E731
    whole = [batch.frames for batch in make_loader()]
    loader = make_loader()
    iterator = iter(loader)
    assert torch.equal(next(iterator).frames, whole[0])
    state = loader.state_dict()
    iterator.close()  # with a batch inside the pipeline
    other = make_loader()
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    for batches, expected in ((other, whole[1:]), (loader, whole)):
        assert all(torch.equal(batch.frames, frames) for batch, frames in zip(batches, expected, strict=True))


def test_a_batch_of_one_kind_is_not_copied(folder: Path) -> None:
    (batch,) = ClipLoader([folder / "0.mp4", folder / "4.avi"], backend="dali", frames=4, size=32, batch_size=2)
    assert batch.frames.is_contiguous() and batch.frames._base is None
    kept = batch.frames.clone()
    for _ in ClipLoader([folder / "1.mp4"] * 6, backend="dali", frames=4, size=32, batch_size=2):
        pass
    assert torch.equal(batch.frames, kept), "its memory is its own, whatever the pipeline does next"


def test_what_goes_to_nvdec(tmp_path: Path) -> None:
    table = replace(index(encode(tmp_path / "a.mp4", coded_frames(3, 256, 320))), pts=(0, 1, 2))
    assert backend.why_not(table, "cuda") is None
    for change, reason in (
        ({"codec": "gif"}, "codec gif"),
        ({"pix_fmt": "yuv444p"}, "pixel format yuv444p"),
        ({"pix_fmt": "yuv420p10le"}, "pixel format yuv420p10le"),
        ({"width": 8000}, "size 8000 x 256"),
        ({"height": 32}, "size 320 x 32"),
        ({"height": 255}, "size 320 x 255"),
        ({"skipped": 5}, "5 packets are not to be shown"),
        ({"counted": "why"}, "frames cannot be found by their times"),
        ({"damage": "truncated"}, "truncated"),
        ({"streams": 2}, "2 video streams"),
        ({"color_space": 1}, "colours other than BT.601 of 16 to 235 (matrix 1, range 0)"),
        ({"color_range": 2}, "colours other than BT.601 of 16 to 235 (matrix 2, range 2)"),
    ):
        assert backend.why_not(replace(table, **change), "cuda") == reason
    assert backend.why_not(replace(table, codec="hevc", pix_fmt="yuv420p10le"), "cuda") is None
    assert backend.why_not(table, "cpu") == "codec h264"


def test_without_the_drivers_video_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend.ctypes, "CDLL", missing)
    backend.best_device.cache_clear()
    with pytest.warns(RuntimeWarning, match="libnvcuvid") as caught:
        assert [backend.best_device(), backend.best_device()] == ["cpu", "cpu"]
    assert len(caught) == 1
    backend.best_device.cache_clear()


def test_crops_of_turned_frames() -> None:
    """What is cropped before a turn is what would have been after it."""
    stored = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8))
    for rotation, mirrored in itertools.product((0, 90, 180, 270), (False, True)):
        shown = torch.rot90(stored, rotation // 90, (1, 2))
        shown = shown.flip(2) if mirrored else shown
        table = type("", (), {"rotation": rotation, "mirrored": mirrored})()
        plan = backend.ClipPlan("", table, [0], tuple(shown.shape[1:3]), (3, 5), True, None)
        job = backend.Job.of(plan, (11, 7))
        (top, left), (height, width) = job.corner, job.shape
        cropped = stored[:, top : top + height, left : left + width]
        cropped = cropped.flip(2) if job.flip and not job.turns else cropped  # as the pipeline does
        assert job.size == (20, 30)
        assert torch.equal(job.finished(cropped), shown[:, 3:14, 5:12].flip(2))
