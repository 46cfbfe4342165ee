"""The loader: same batches for any number of workers, ranks and restarts; bad files do not stop it and are named."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from i2v_kernels.video import Batch, ClipLoader, VideoError, decode, index, register_backend
from i2v_kernels.video.pyav import PyAVDecoder

from .clips import COUNT, VIDEOS, coded_frames, encode, packet_places, read_number


@pytest.fixture
def mixed(root: Path, tmp_path: Path) -> list[tuple[str, int]]:
    """Good and bad files; the label of a file is its position."""
    good = sorted(root.rglob("[0-9].mp4"))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(9999))
    whole = encode(tmp_path / "whole.mp4", coded_frames(COUNT, 32, 64), bf="0", container={"movflags": "faststart"})
    offset, _ = packet_places(whole)[20]
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:offset])
    damaged = bytearray(encode(tmp_path / "torn.mp4", coded_frames(COUNT, 32, 64), bf="0").read_bytes())
    offset, size = packet_places(tmp_path / "torn.mp4")[17]
    damaged[offset : offset + size] = b"\xff" * size
    (tmp_path / "torn.mp4").write_bytes(damaged)
    bad = {name: tmp_path / f"{name}.mp4" for name in ("empty", "noise", "cut", "torn", "missing")}
    paths = [good[0], bad["empty"], bad["noise"], good[1], bad["cut"], good[2], bad["torn"], bad["missing"]]
    return [(str(path), i) for i, path in enumerate(paths)]


def content(batches: list[Batch]) -> list:
    """Plain lists, to compare."""
    plain = [dict(batch) for batch in batches]
    return [{name: value if name == "path" else value.tolist() for name, value in batch.items()} for batch in plain]


def make(sources: object, **options: object) -> ClipLoader:
    return ClipLoader(sources, **({"frames": 4, "size": 32, "batch_size": 2} | options))  # type: ignore[arg-type]


def test_a_batch(root: Path) -> None:
    loader = make(root)
    assert loader.classes == ("ape", "bee")
    assert loader.backend == ("pyav", "first that can run")
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    batch = batches[1]
    assert batch.frames.shape == (2, 4, 32, 32, 3)
    assert batch.frames.dtype == torch.uint8
    assert batch.frame_index.tolist() == [[3, 11, 18, 26]] * 2
    assert batch.pts.dtype == torch.float64
    assert batch.pts[0].tolist() == pytest.approx([0.12, 0.44, 0.72, 1.04])
    assert torch.cat([b.label for b in batches]).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.valid.all() and batch["view"].tolist() == [0, 0] and batch.item.tolist() == [2, 3]
    assert [Path(path).name for path in batch.path] == ["4.mp4", "6.mp4"]
    whole = decode(batch.path[0], batch.frame_index[0].tolist(), 32)
    assert torch.equal(batch.frames[0], whole[:, :, 16:48])
    assert batch.to("cpu").frames.shape == batch.frames.shape
    with pytest.raises(KeyError, match="frame_index"):
        batch["nope"]
    stats = loader.stats()
    assert stats["clips"] == 7 and stats["bad_files"] == 0 and 0 < stats["wait_seconds"] <= stats["seconds"]
    assert str(loader.report()) == "no bad files"


def test_same_batches_for_any_number_of_workers(mixed: list) -> None:
    options = {"sampling": "tsn_train", "shuffle": True, "seed": 3, "batch_size": 3}
    expected = None
    for workers in (0, 1, 2):
        loader = make(mixed, workers=workers, **options)
        torch.manual_seed(0)
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append(content(list(loader)))
        assert torch.initial_seed() == 0 and torch.rand(1).item() == pytest.approx(0.4962566)
        expected = expected or (epochs, dict(loader.report().bad))
        assert (epochs, loader.report().bad) == expected
        # Left in the middle, and begun again: the prefetched batches of the first iteration do not show up.
        list(islice(loader, 1))
        assert content(list(loader)) == epochs[1]
    assert epochs[0] != epochs[1]


def test_share_comes_from_torch_distributed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert (make(root).rank, make(root).world_size) == (1, 3)
    assert make(root, rank=0, world_size=1).world_size == 1


def test_spawned_workers(root: Path) -> None:
    expected = content(list(make(root)))
    assert content(list(make(root, workers=1, multiprocessing_context="spawn"))) == expected


def test_what_is_sampled_depends_on_seed_and_epoch(root: Path) -> None:
    loader = make(root, sampling="tsn_train")
    first = content(list(loader))
    assert content(list(loader)) == first
    assert content(list(make(root, sampling="tsn_train", seed=1))) != first
    loader.set_epoch(1)
    assert content(list(loader)) != first
    loader.set_epoch(0)
    assert content(list(loader)) == first


@pytest.mark.parametrize("views", [(1, 1), (2, 3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_of_ranks(root: Path, views: tuple[int, int], drop_last: bool) -> None:
    options = {"shuffle": True, "views": views, "drop_last": drop_last}
    total = VIDEOS * views[0] * views[1]
    whole = [entry for request in make(root, **options, batch_size=1).plan() for entry in request.entries]
    assert len(set(whole)) == total and all(entry.valid for entry in whole)
    for world_size in (1, 2, 3, 20):
        loaders = [make(root, **options, rank=rank, world_size=world_size) for rank in range(world_size)]
        plans = [list(loader.plan()) for loader in loaders]
        assert {len(plan) for plan in plans} == {len(loaders[0])}
        steps = [[request.entries for request in step] for step in zip(*plans)]
        assert all(len({len(entries) for entries in step}) == 1 for step in steps)
        shown = [entry for step in steps for entries in step for entry in entries]
        valid = [entry for entry in shown if entry.valid]
        kept = total // (2 * world_size) * 2 * world_size if drop_last else total
        assert valid == whole[:kept]
        assert len(shown) - len(valid) < world_size


def test_resume_in_the_middle_of_an_epoch(mixed: list) -> None:
    options = {"sampling": "tsn_train", "shuffle": True}
    loader = make(mixed, **options)
    loader.set_epoch(4)
    whole = list(loader)
    for workers in (0, 1):
        for stop in (0, 1, 3, len(loader)):
            before = make(mixed, **options, workers=workers)
            before.set_epoch(4)
            list(islice(before, stop))
            after = make(mixed, **options, workers=workers)
            after.load_state_dict(before.state_dict())
            after.set_epoch(4)
            assert after.epoch == 4
            assert content(list(after)) == content(whole[stop:])
            # The next iteration is a whole epoch again.
            assert len(list(after)) == len(loader)
            after.load_state_dict(before.state_dict())
            after.set_epoch(5)
            assert len(list(after)) == len(loader)


def test_resume_with_another_plan_is_refused(root: Path) -> None:
    state = make(root).state_dict()
    with pytest.raises(ValueError, match="batch_size: 2 -> 3"):
        make(root, batch_size=3).load_state_dict(state)


def test_bad_files_are_replaced_and_named(mixed: list) -> None:
    loader = make(mixed, batch_size=len(mixed), sampling="tsn_test")
    (batch,) = loader
    # Of the bad ones, 1 and 2 show video 3, and the last one shows the first.
    assert batch.label.tolist() == batch.item.tolist() == [0, 3, 3, 3, 4, 5, 6, 0]
    assert batch.valid.tolist() == [True, False, False, True, True, True, True, False]
    assert batch.path == [mixed[i][0] for i in batch.label]
    assert batch.frame_index[4].tolist() == [2, 7, 12, 17], "20 frames are there"
    assert batch.frame_index[6].tolist() == [2, 6, 10, 14], "17 frames decode"
    for clip, numbers in zip(batch.frames, batch.frame_index):
        assert torch.equal(clip, clip) and numbers.max() < COUNT
    reasons = {Path(path).stem: why for path, (why, _) in loader.report().bad.items()}
    assert reasons["empty"] == "empty file"
    assert reasons["missing"] == "no such file or directory"
    assert reasons["noise"].startswith("cannot be read: Invalid data")
    assert reasons["cut"] == "truncated: 20 of 30 frames are there"
    assert reasons["torn"].startswith("only the first 17 of 30 frames decode")
    assert len(reasons) == loader.stats()["bad_files"] == 5
    assert all(mixed[i][0] in str(loader.report()) for i in (1, 2, 4, 6, 7))


def test_bad_files_are_left_out(mixed: list) -> None:
    loader = make(mixed, on_error="skip", batch_size=1)
    assert [batch.label.tolist() for batch in loader] == [[0], [3], [4], [5], [6]]
    assert loader.state_dict()["position"] == len(loader) == 8
    assert len(loader.report()) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_raised(mixed: list, workers: int) -> None:
    loader = make(mixed, on_error="raise", batch_size=1, workers=workers)
    seen = iter(loader)
    assert next(seen).label.tolist() == [0]
    with pytest.raises(VideoError, match=f"{re.escape(mixed[1][0])}: empty file"):
        next(seen)
    assert list(loader.report().bad) == [mixed[1][0]]


def test_replacing_has_an_end(root: Path) -> None:
    good = str(next(root.rglob("0.mp4")))
    with pytest.raises(VideoError, match="nor can the next 10 videos be used") as caught:
        list(make([*(f"missing{i}.mp4" for i in range(11)), good]))
    assert caught.value.path == "missing0.mp4"
    assert all(batch.path == [good] * 2 for batch in make([*(f"missing{i}.mp4" for i in range(9)), good]))
    with pytest.raises(VideoError, match="no such file"):
        list(make(["missing.mp4"]))


def test_views(root: Path) -> None:
    path = str(next(root.rglob("0.mp4")))
    (batch,) = make([path], views=(2, 3), batch_size=6, sampling="window")
    assert batch.view.tolist() == list(range(6)) and batch.item.tolist() == [0] * 6
    assert batch.frame_index[::3].tolist() == [[0, 1, 2, 3], [26, 27, 28, 29]]
    whole = decode(path, [0, 1, 2, 3], 32)
    for spatial, left in enumerate((0, 16, 32)):
        assert torch.equal(batch.frames[spatial], whole[:, :, left : left + 32])
    numbers = [read_number(decode(path, [i])[0]) for i in batch.frame_index[4].tolist()]
    assert numbers == [26, 27, 28, 29]


def test_csv(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(next(root.rglob("0.mp4")).read_bytes())
    table = tmp_path / "list.csv"
    for text, labels, classes, captions in (
        ("a.mp4,3\na.mp4,0\n", [3, 0], (), ["", ""]),
        (
            'path,label,caption\na.mp4,bee,"1, 2"\n\na.mp4,ape,three\n',
            [1, 0],
            ("ape", "bee"),
            ["1, 2", "three"],
        ),
        ("caption,path\nhello,a.mp4\n", [-1], (), ["hello"]),
        (f"\ufeff{tmp_path}/a.mp4\n", [-1], (), [""]),
    ):
        table.write_text(text, encoding="utf-8")
        loader = make(table)
        (batch,) = loader
        assert (batch.label.tolist(), loader.classes) == (labels, classes)
        assert [loader.videos[i].caption for i in batch.item] == captions
        assert batch.valid.all()
    for text, message in (
        ("a.mp4,1,b,c\n", "line 1"),
        ("path,label\n,1\n", "line 2"),
        ("path\n", "no videos"),
        ("clip_no,label\na.mp4,1\n", "line 1"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            make(table)


def test_lists(root: Path) -> None:
    path = next(root.rglob("0.mp4"))
    assert make([path, (path, 4), (str(path), None), [path, 2, "words"]]).videos[3] == (str(path), 2, "words")
    assert make([(path, "b"), (path, "a"), path]).classes == ("a", "b")
    with pytest.raises(TypeError, match="expected a path"):
        make([path, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames"),
        ({"size": (3, 4)}, "size"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"seed": -1}, "seed"),
        ({"sampling": "tsm"}, "sampling"),
        ({"sampling": lambda count, frames, rng, clip, clips: [0]}, "gave 1 frames"),
        ({"sampling": "linspace", "views": (2, 1)}, "1 clip"),
        ({"views": (1, 2)}, "views"),
        ({"on_error": "ignore"}, "on_error"),
        ({"backend": "decord"}, "'pyav'"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": 0}, "go together"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(["a.mp4"], **options)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no class folders"):
        make(tmp_path)
    with pytest.raises(ValueError, match="no videos"):
        make([])
    with pytest.raises(TypeError, match="got int"):
        make(3)


def test_changed_file_is_indexed_again(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    loader = make([path])
    for count in (COUNT, 12):
        encode(path, coded_frames(count, 32, 64))
        (batch,) = loader
        assert batch.frame_index.max() == count - 1 - count // 8


class CountingDecoder(PyAVDecoder):
    def __init__(self) -> None:
        self.indexed = self.decoded = 0

    def index(self, path):
        self.indexed += 1
        return super().index(path)

    def decode(self, path, indices, size=None, *, index=None):
        self.decoded += 1
        return super().decode(path, indices, size, index=index)


def test_another_decoder(root: Path) -> None:
    decoder = CountingDecoder()
    register_backend("counting", decoder)
    register_backend("absent", decoder, lambda: "needs a card")
    loader = make(root, backend="counting", views=(1, 3), batch_size=3)
    assert loader.backend == ("counting", "asked for by name")
    for _ in range(2):
        list(loader)
    assert (decoder.indexed, decoder.decoded) == (VIDEOS, 2 * VIDEOS), "indexed once, the three crops decoded at once"
    with pytest.raises(ImportError, match="'absent' cannot run: needs a card"):
        index("a.mp4", backend="absent")
    with pytest.raises(ValueError, match="counting"):
        index("a.mp4", backend="nope")


def test_order_of_an_epoch_is_a_permutation(root: Path) -> None:
    loader = make(root, shuffle=True, batch_size=1)
    orders = []
    for epoch in random.Random(0).sample(range(100), 5):
        loader.set_epoch(epoch)
        orders.append(tuple(request.entries[0].item for request in loader.plan()))
    assert all(sorted(order) == list(range(VIDEOS)) for order in orders)
    assert len(set(orders)) == 5


def test_random_crop_and_flip(root: Path) -> None:
    """Other squares of the same frames each epoch, the same for the same seed and epoch."""
    plain, varied = make(root, batch_size=VIDEOS), make(root, batch_size=VIDEOS, crop="random", flip=True)
    wide = decode(varied.videos[0].path, [0], varied._reader.size)
    assert wide.shape[2] > wide.shape[1], "so that there is room"
    seen = []
    for epoch in range(6):
        varied.set_epoch(epoch)
        plain.set_epoch(epoch)
        (a,), (b,), (again,) = varied, plain, make_at(root, epoch)
        assert torch.equal(a.frame_index, b.frame_index)
        assert torch.equal(a.frames, again.frames)
        for clip, item, numbers in zip(a.frames, a.item, a.frame_index):
            whole = decode(varied.videos[item].path, numbers.tolist(), varied._reader.size)
            squares = [whole[:, :, left : left + clip.shape[2]] for left in range(whole.shape[2] - clip.shape[2] + 1)]
            found = [(left, flip) for left, x in enumerate(squares) for flip in (False, True) if same(x, clip, flip)]
            assert found
            seen.append(found[0])
    assert {flip for _, flip in seen} == {False, True}
    assert len({left for left, _ in seen}) > 5


def same(x: torch.Tensor, clip: torch.Tensor, flip: bool) -> bool:
    return torch.equal(x.flip(2) if flip else x, clip)


def make_at(root: Path, epoch: int) -> ClipLoader:
    loader = make(root, batch_size=VIDEOS, crop="random", flip=True, workers=1)
    loader.set_epoch(epoch)
    return loader
