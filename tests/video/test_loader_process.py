"""What a loader takes of its process and says of its work: files, memory, threads, progress, stalls."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from i2v_kernels.video import ClipLoader, register_backend
from i2v_kernels.video.pool import Pool
from i2v_kernels.video.pyav import PyAVDecoder
from i2v_kernels.video.reader import Result

from .clips import VIDEOS, coded_frames, encode
from .test_loader import make


def test_kept_batches_do_not_use_up_open_files(root: Path) -> None:
    loader = make(root, batch_size=1, workers=1)
    kept = [next(iter(loader))]
    before = len(os.listdir("/proc/self/fd"))
    kept += list(loader)
    assert len(os.listdir("/proc/self/fd")) <= before + VIDEOS
    labels = [batch.label for batch in kept]
    del kept
    assert len(os.listdir("/proc/self/fd")) <= before
    assert len(labels) == VIDEOS + 1


def test_one_iteration_at_a_time(root: Path) -> None:
    loader = make(root)
    first, second = iter(loader), iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="one at a time"):
        next(first)
    assert len(list(second)) == 3


class StuckDecoder(PyAVDecoder):
    def decode(self, path, indices, size=None, *, index=None):
        if "2" in Path(path).stem:
            time.sleep(60)
        return super().decode(path, indices, size, index=index)


def test_a_stall_names_the_files(root: Path) -> None:
    register_backend("stuck", StuckDecoder())
    loader = make(root, backend="stuck", workers=1, batch_size=1, stall_seconds=2)
    with pytest.raises(TimeoutError, match=r"no batch for 2 s .* of .*2\.mp4\. If"):
        list(loader)
    for seconds in (-1, "1", float("nan")):
        with pytest.raises(ValueError, match="stall_seconds"):
            make(root, stall_seconds=seconds)
    for options in ({"crop": "top"}, {"crop": "random", "views": (1, 3)}):
        with pytest.raises(ValueError, match="crop"):
            make(root, **options)


class DeadlyDecoder(PyAVDecoder):
    """Ends its process at a file whose name has a 2 in it, in the way that a file beside it names."""

    def decode(self, path, indices, size=None, *, index=None):
        how = Path(path).parent.parent / "how"
        if "2" in Path(path).stem and how.exists():
            if (text := how.read_text()) == "exit":
                os._exit(3)
            if text == "raise":
                raise Unpicklable(1, 2)
            os.kill(os.getpid(), int(text))
        return super().decode(path, indices, size, index=index)


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.fixture
def deadly(root: Path) -> Iterator[Path]:
    register_backend("deadly", DeadlyDecoder())
    yield root / "how"
    (root / "how").unlink(missing_ok=True)


def test_a_dead_worker_ends_each_iteration_at_once(root: Path, deadly: Path) -> None:
    loader = make(root, backend="deadly", workers=2, batch_size=1, stall_seconds=100)
    whole = [batch.item.tolist() for batch in loader]
    ways = {"9": r"was killed by signal 9 \(SIGKILL, out of memory\?\)", "exit": "ended with exit code 3", "11": "SIGSEGV"}
    for how, text in ways.items():
        deadly.write_text(how)
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(RuntimeError, match=rf"worker process \d+ .*{text}.* batch 1 of epoch 0: .*2\.mp4"):
                list(loader)
            assert time.monotonic() - begun < 30
    deadly.unlink()
    assert [batch.item.tolist() for batch in loader] == whole, "by new workers"


def test_what_a_worker_raises_is_raised(root: Path, deadly: Path) -> None:
    loader = make(root, backend="deadly", workers=1, batch_size=1)
    deadly.write_text("raise")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2") as caught:
            list(loader)
        assert "in decode" in str(caught.value.__cause__)
    deadly.unlink()
    assert len(list(loader)) == VIDEOS


@pytest.mark.parametrize("place", ["main", "thread"])
def test_workers_killed_at_any_moment(place: str, root: Path) -> None:
    """From outside, while batches are made, wait or are fetched: an error or a whole epoch, soon; then a whole epoch."""
    loader = make(root, workers=2, batch_size=1, stall_seconds=60, views=(4, 1))
    whole = [batch.item.tolist() for batch in loader]
    rng, ends = random.Random(0), []

    def run() -> None:
        for i in range(12):
            seen = []
            try:
                for batch in loader:
                    seen.append(batch.item.tolist())
                    if len(seen) == 1:
                        pid = rng.choice(loader._pool._workers).process.pid
                        timer = threading.Timer(rng.random() * 0.05 * (i > 3), os.kill, (pid, signal.SIGKILL))
                        timer.start()
                ends.append("whole")
                assert seen == whole
            except RuntimeError as error:
                assert "was killed by signal 9" in str(error)
                ends.append("error")
            timer.join()

    if place == "main":
        run()
    else:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(run).result()
    assert len(ends) == 12 and ends.count("error") >= 4
    begun = time.monotonic()
    for worker in loader._pool._workers:
        worker.process.kill()  # while they have nothing to do
        worker.process.join()
    assert [batch.item.tolist() for batch in loader] == whole
    assert time.monotonic() - begun < 20


def test_signals_of_the_group_are_left_to_the_first_process(root: Path) -> None:
    loader = make(root, workers=2, batch_size=1)
    batches = iter(loader)
    next(batches)
    for worker in loader._pool._workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.process.pid, number)
    assert len(list(batches)) == VIDEOS - 1
    processes = [worker.process for worker in loader._pool._workers]
    del batches, loader
    assert not any(process.is_alive() for process in processes), "they end with the loader"


def begin(root: Path, end: object) -> None:
    loader = make(root, workers=2)
    next(iter(loader))
    end.send([worker.process.pid for worker in loader._pool._workers])  # type: ignore[attr-defined]
    time.sleep(60)


def test_workers_end_with_a_process_that_is_killed(root: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=begin, args=(root, there))
    process.start()
    assert here.poll(60)
    pids = here.recv()
    process.kill()
    process.join()
    until = time.monotonic() + 20
    while alive := [pid for pid in pids if lives(pid)]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_iterations_that_are_left_cost_nothing_later(root: Path) -> None:
    loader = make(root, workers=1, batch_size=1, prefetch=3)
    for _ in range(50):
        next(iter(loader))
    assert [batch.item.tolist() for batch in loader] == [[i] for i in range(VIDEOS)]


def test_batches_are_finished_in_a_thread_ahead(root: Path) -> None:
    loader = make(root, workers=1, batch_size=1)
    threads: list[str] = []

    def finish(result: Result) -> Result:
        threads.append(threading.current_thread().name)
        return result

    pool = Pool(loader._reader, loader._plan, 1, 2, None, 60, finish)
    assert [result.number for result in pool.results(0, 2)] == list(range(2, VIDEOS))
    assert len(threads) == VIDEOS - 2 and all(name.startswith("i2v-finish") for name in threads)


def test_an_epoch_of_nothing_is_said(root: Path) -> None:
    with pytest.warns(UserWarning, match="no batch: drop_last=True .* step of 20 clips; 7 clips .*batch_size=5, world_size=4"):
        assert len(make(root, batch_size=5, rank=0, world_size=4, drop_last=True)) == 0
    with pytest.warns(UserWarning, match="rank 8 has no clip of its own.* 7 clips"):
        loader = make(root, rank=8, world_size=9)
    assert not any(batch.valid.any() for batch in loader)
    loader = make(["/nowhere/a.mp4", "/nowhere/b.mp4"], on_error="skip")
    with pytest.warns(UserWarning, match="epoch 0 gave no batch at all, bad files: 2"):
        assert list(loader) == []


def test_progress(root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make([*root.rglob("[0-9].mp4"), "/missing.mp4"], batch_size=2, progress=True)
    batches = len(list(loader))
    line = capsys.readouterr().err  # of a file or a pipe: lines
    pattern = rf"epoch 0: {batches} of {batches} batches, [\d.]+ clips/s, \d+% waiting, 1 bad files, 0 s left \n"
    assert re.fullmatch(pattern, line), line
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    list(loader)
    assert re.fullmatch(rf"(\r.*)*\r{pattern}", capsys.readouterr().err)
    list(make(root))
    assert capsys.readouterr().err == ""


def loaded(paths: list[Path], backend: str) -> list[tuple[int, int, int]]:
    """Resident MiB, files and threads of this process after 500 clips, and after 1500 more."""
    loader = ClipLoader(paths * 50, frames=4, size=48, batch_size=10, backend=backend, workers=0)

    def state() -> tuple[int, int, int]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident >> 20, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    states = []
    for epochs in (2, 6):
        for _ in range(epochs):
            assert sum(len(batch) for batch in loader) == 250
        states.append(state())
    return states


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_two_thousand_clips_leave_nothing_behind(backend: str, tmp_path: Path) -> None:
    """Resident memory stays within 24 MiB of what it was after the first 500; no file or thread is left open.

    In a process of its own: what other tests have left is given back, or taken again, at any time.
    """
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    how = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"} if backend == "dali" else {"preset": "ultrafast"}
    paths = [encode(tmp_path / f"{i}.mp4", coded_frames(20, 64 + 16 * i, 96), **how) for i in range(4)]
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        before, after = process.submit(loaded, [*paths, tmp_path / "bad.mp4"], backend).result()
    assert after[0] <= before[0] + 24 and after[1:] <= before[1:], (before, after)
