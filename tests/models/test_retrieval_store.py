"""The store of features on disk: what is written is read, whatever kills the writer, and nothing else is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from i2v_models import checkpoint
from i2v_models.retrieval import FeatureStore
from i2v_models.retrieval import store as store_module
from i2v_models.retrieval import writer as writer_module

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def names(count: int, first: int = 0) -> list[str]:
    return [f"folder {i % 3}/clip-{i}é.mp4"[: 5 + i % 20] + str(i) for i in range(first, first + count)]


def filled(folder: Path, clips: int = 25, block_clips: int = 10, **how) -> FeatureStore:
    """A store of vectors with 6 numbers in blocks of ``block_clips``."""
    store = FeatureStore.create(folder, 6, **{"dtype": "float32"} | how)
    with store.writer(block_bytes=block_clips * 6 * store.dtype.itemsize) as writer:
        writer.append(names(clips), numbers(clips, 6))
    return FeatureStore(folder)


def contents(store: FeatureStore) -> Tensor:
    parts = [part.features.clone() for part in store.read()]
    return torch.cat(parts) if parts else torch.empty(0, store.dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read(tmp_path, dtype):
    store = filled(tmp_path / "store", dtype=dtype)
    assert len(store) == 25 and store.dtype is dtype and store.dim == 6 and store.tokens is None
    assert [block.clips for block in store.blocks] == [10, 10, 5]
    assert torch.equal(contents(store), numbers(25, 6).to(dtype))
    assert list(store.all_names()) == names(25)
    assert store.names([24, 0, 10, 9, 3]) == [names(25)[i] for i in (24, 0, 10, 9, 3)]
    assert store.names(torch.tensor([7])) == [names(25)[7]]
    for first, last, lengths in ((8, 21, [2, 10, 1]), (10, 20, [10]), (3, 3, [])):
        assert [len(part.features) for part in store.read(first, last)] == lengths
    assert torch.equal(torch.cat([part.features for part in store.read(8, 21)]), numbers(25, 6)[8:21].to(dtype))
    store.verify()
    assert "25 clips of [6]" in repr(store)


def test_tokens_with_mask_and_weights(tmp_path):
    store = FeatureStore.create(tmp_path / "store", 4, tokens=5, mask=True, weights=True)
    tokens, weights = numbers(7, 3, 4), numbers(7, 3, seed=1)
    mask = numbers(7, 3, seed=2) > 0
    with store.writer(block_bytes=4 * 5 * 4 * 2) as writer:
        writer.append(names(7), tokens, mask=mask, weights=weights)
        writer.append(names(2, 7), numbers(2, 5, 4, seed=3), weights=torch.ones(2, 5))
    parts = list(FeatureStore(tmp_path / "store", verify=True).read())
    features, masks, kept = (torch.cat(values) for values in zip(*parts))
    assert features.shape == (9, 5, 4) and masks.dtype is torch.bool and kept.dtype is torch.float32
    assert torch.equal(features[:7, :3], tokens.half()) and not features[:7, 3:].any()
    assert torch.equal(masks[:7, :3], mask) and not masks[:7, 3:].any() and masks[7:].all()
    assert torch.equal(kept[:7, :3], weights) and not kept[:7, 3:].any()


def test_unit_length(tmp_path):
    store = filled(tmp_path / "store", normalize=True)
    assert store.normalize
    assert torch.equal(contents(store), torch.nn.functional.normalize(numbers(25, 6), dim=-1))


def test_flushes_and_reopening_do_not_show(tmp_path):
    whole = filled(tmp_path / "whole", model={"model": "ViT-B-32"})
    FeatureStore.create(tmp_path / "pieces", 6, dtype="float32", model={"model": "ViT-B-32"})
    for first in range(0, 25, 4):
        with FeatureStore(tmp_path / "pieces").writer(block_bytes=240) as writer:
            for i in range(first, min(25, first + 4)):
                writer.append(names(1, i), numbers(25, 6)[i : i + 1])
                if i % 3 == 0:
                    writer.flush()
                    assert len(FeatureStore(tmp_path / "pieces")) == i + 1 == len(writer)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "pieces")]
    assert files[0] == files[1] == [block.file for block in whole.blocks] + ["index.json"]
    for file in files[0]:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "pieces" / file).read_bytes()


def test_another_block_size_goes_on_after_the_blocks_there(tmp_path):
    filled(tmp_path / "store")
    for block_bytes, want in ((72, [10, 10, 5, 3, 2]), (480, [10, 10, 5, 3, 7])):
        with FeatureStore(tmp_path / "store").writer(block_bytes=block_bytes) as writer:
            count = len(writer)
            writer.append(names(5, count), numbers(60, 6, seed=4)[count : count + 5])
        store = FeatureStore(tmp_path / "store", verify=True)
        assert [block.clips for block in store.blocks] == want
    assert list(store.all_names()) == names(35)
    assert torch.equal(contents(store), torch.cat([numbers(25, 6), numbers(60, 6, seed=4)[25:35]]))


def test_an_exception_keeps_what_was_flushed(tmp_path):
    store = filled(tmp_path / "store")
    with pytest.raises(RuntimeError, match="elsewhere"), store.writer(block_bytes=240) as writer:
        writer.append(names(3, 25), numbers(3, 6))
        writer.flush()
        writer.append(names(1, 28), numbers(1, 6))
        raise RuntimeError("elsewhere")
    assert len(FeatureStore(tmp_path / "store", verify=True)) == 28
    assert not (tmp_path / "store" / ".lock").exists()


@pytest.mark.parametrize("step", range(6))
def test_stopped_between_any_two_steps_of_a_write(tmp_path, monkeypatch, step):
    """Renaming and syncing are where a write can be cut; whatever was done before stays as it was or is whole."""
    filled(tmp_path / "store")
    done = []

    def cut(function):
        def call(*arguments):
            done.append(function.__name__)
            if len(done) > step:
                os._exit(7)
            return function(*arguments)

        return call

    if (child := os.fork()) == 0:
        monkeypatch.setattr(checkpoint, "_sync", cut(checkpoint._sync))
        monkeypatch.setattr(checkpoint.os, "replace", cut(os.replace))
        with FeatureStore(tmp_path / "store").writer(block_bytes=240) as writer:
            writer.append(names(3, 25), numbers(3, 6))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7  # every step is one of the write's
    store = FeatureStore(tmp_path / "store", verify=True)
    assert len(store) == (28 if step == 5 else 25)
    assert list(store.all_names()) == names(len(store))
    with store.writer(block_bytes=240) as writer:
        writer.append(names(28, len(store))[: 30 - len(store)], numbers(30, 6)[len(store) :])
    store = FeatureStore(tmp_path / "store", verify=True)
    assert list(store.all_names()) == names(30)
    files = sorted(path.name for path in store.folder.iterdir())
    assert files == [block.file for block in store.blocks] + ["index.json"]  # nothing is left of it


def test_killed_while_it_writes(tmp_path):
    FeatureStore.create(tmp_path / "store", 64)
    script = (
        "import sys, torch\nfrom i2v_models.retrieval import FeatureStore\n"
        "with FeatureStore(sys.argv[1]).writer(block_bytes=64 * 2 * 50) as writer:\n"
        "    for i in range(10**6):\n"
        "        writer.append([str(i)], torch.full((1, 64), float(i % 100)))\n"
        "        if i % 3 == 0: writer.flush()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        try:
            deadline = time.monotonic() + 60
            while len(FeatureStore(tmp_path / "store").blocks) < 3 and time.monotonic() < deadline:
                assert process.poll() is None
            with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
                FeatureStore(tmp_path / "store").writer()
        finally:
            process.send_signal(signal.SIGKILL)
    store = FeatureStore(tmp_path / "store", verify=True)
    assert len(store) > 100
    assert list(store.all_names()) == [str(i) for i in range(len(store))]
    assert torch.equal(contents(store)[:, 0], (torch.arange(len(store)) % 100).half())
    with store.writer() as writer:
        writer.append(["last"], torch.zeros(1, 64))
    assert FeatureStore(tmp_path / "store", verify=True).names([len(store)]) == ["last"]


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    store = filled(tmp_path / "store")
    monkeypatch.setattr(writer_module.checkpoint, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"block-.*cannot be written.*No space left"), store.writer(block_bytes=240) as writer:
        writer.append(names(3, 25), numbers(3, 6))
    assert torch.equal(contents(FeatureStore(tmp_path / "store", verify=True)), numbers(25, 6))


@pytest.mark.parametrize(
    ("how", "arguments", "error", "says"),
    [
        ({}, {"features": numbers(2, 5)}, ValueError, r"must be \[2, 6\], one for each name, got \[2, 5\]"),
        ({}, {"features": numbers(3, 6)}, ValueError, r"got \[3, 6\]"),
        ({}, {"features": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "int64"),
        ({}, {"features": torch.tensor([1.0, torch.inf]).view(2, 1).expand(2, 6)}, ValueError, "'b' are not finite"),
        ({"dtype": "float16"}, {"features": torch.tensor([1.0, 7e4]).view(2, 1).expand(2, 6)}, ValueError, "'b'.*float16"),
        ({}, {"features": numbers(2, 6), "mask": torch.ones(2, 6) > 0}, ValueError, "mask is given"),
        ({}, {"features": numbers(2, 6), "weights": torch.ones(2, 6)}, ValueError, "weights must be None"),
        ({}, {"names": ["a", 3], "features": numbers(2, 6)}, TypeError, "got 3"),
        ({"tokens": 3}, {"features": numbers(2, 2, 6)}, ValueError, r"must be \[2, 3, 6\]"),
        ({"tokens": 3, "mask": True}, {"features": numbers(2, 4, 6)}, ValueError, r"must be \[2, at most 3, 6\]"),
        ({"tokens": 3, "mask": True}, {"features": numbers(2, 6)}, ValueError, r"got \[2, 6\]"),
        ({"tokens": 3, "mask": True}, {"features": numbers(2, 2, 6), "mask": torch.ones(2, 3) > 0}, ValueError, r"\[2, 2\]"),
        ({"tokens": 3, "mask": True}, {"features": numbers(2, 2, 6), "mask": torch.ones(2, 2)}, ValueError, "float32"),
        ({"tokens": 3, "weights": True}, {"features": numbers(2, 3, 6)}, ValueError, "weights must be given"),
        ({"tokens": 3, "weights": True}, {"features": numbers(2, 3, 6), "weights": numbers(2, 3) / 0}, ValueError, "finite"),
    ],
)
def test_what_does_not_fit_is_not_added(tmp_path, how, arguments, error, says):
    with FeatureStore.create(tmp_path / "store", 6, **{"dtype": "float32"} | how).writer() as writer:
        with pytest.raises(error, match=says):
            writer.append(**{"names": ["a", "b"]} | arguments)
        assert len(writer) == 0
    assert len(FeatureStore(tmp_path / "store")) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 1.5}, TypeError, "dim must be a whole number, got 1.5"),
        ({"dim": 4, "tokens": 0}, ValueError, "tokens must be at least 1"),
        ({"dim": 4, "dtype": "int8"}, ValueError, "'int8' cannot be stored"),
        ({"dim": 4, "mask": True}, ValueError, "mask=True belongs to tokens"),
        ({"dim": 4, "weights": True}, ValueError, "weights=True belongs to tokens"),
    ],
)
def test_create_names_what_is_wrong(tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        FeatureStore.create(tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists()


def test_create_does_not_replace_a_store(tmp_path):
    filled(tmp_path / "store")
    with pytest.raises(ValueError, match="already holds a store"):
        FeatureStore.create(tmp_path / "store", 6)
    with pytest.raises(ValueError, match=r"not a feature store.*index\.json"):
        FeatureStore(tmp_path)


def damage_index(**changes):
    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | changes))

    return change


def damage_block(**changes):
    """Another block in the place of the first, of the size that the index then says: a store from somebody else."""

    def change(folder: Path) -> None:
        file = folder / FeatureStore(folder).blocks[0].file
        tensors = {name: value for name, value in (load_file(file) | changes).items() if value is not None}
        save_file(tensors, file)
        index = json.loads((folder / "index.json").read_text())
        index["blocks"][0]["bytes"] = file.stat().st_size
        (folder / "index.json").write_text(json.dumps(index))

    return change


def overwrite(content: bytes, at: int | None = None):
    def change(folder: Path) -> None:
        file = folder / FeatureStore(folder).blocks[0].file
        before = file.read_bytes()
        at_ = at if at is not None else len(before) - len(content)
        file.write_bytes(before[:at_] + content + before[at_ + len(content) :])

    return change


BLOCK = {"file": "block-0-10.safetensors", "clips": 10, "bytes": 100, "digest": ""}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "index.json").write_text("{"), r"index\.json cannot be read"),
        (lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe"), r"index\.json cannot be read"),
        (lambda folder: (folder / "index.json").write_text("[" * 100_000), r"index\.json cannot be read"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is not of a feature store"),
        (damage_index(format="other"), r"index\.json is not of a feature store"),
        (damage_index(version=9), "version 9; this package reads version 1"),
        (damage_index(dim="6"), "dim is missing or"),
        (damage_index(dim=-6), "dim or dtype is missing or"),
        (damage_index(dtype="int8"), "dim or dtype is missing or"),
        (damage_index(tokens=0), "tokens is missing or"),
        (damage_index(mask=1), "mask is missing or"),
        (damage_index(model=None), "model is missing or"),
        (damage_index(blocks=[BLOCK | {"file": "../block-0-10.safetensors"}]), "block 0 is missing or"),
        (damage_index(blocks=[BLOCK | {"clips": 0}]), "block 0 is missing or"),
        (damage_index(blocks=[BLOCK | {"clips": "10"}]), "block 0 is missing or"),
        (damage_index(blocks=[BLOCK | {"more": 1}]), "block 0 is missing or"),
        (damage_index(blocks=[BLOCK]), r"block-0-10\.safetensors, which the store's index names, is missing"),
        (lambda folder: os.truncate(folder / FeatureStore(folder).blocks[0].file, 50), "has 50 bytes, but"),
        (overwrite(b"\xff" * 8, 0), r"block-.*cannot be read"),
        (overwrite(b"x" * 40), r"block-.*is damaged: its digest is"),
        (damage_block(features=numbers(10, 5)), r"block-.*'features': \('F32', \[10, 5\]\)"),
        (damage_block(features=numbers(10, 6).half()), r"block-.*'F16'"),
        (damage_block(ends=None), r"block-.*holds"),
        (damage_block(names=None), r"block-.*holds"),
        (damage_block(ends=torch.zeros(9, dtype=torch.int64)), r"block-.*\[9\]"),
        (damage_block(more=torch.zeros(1)), r"block-.*'more'"),
        (damage_block(names=torch.zeros(4, 2, dtype=torch.uint8)), r"block-.*\[4, 2\]"),
    ],
)
def test_damaged_stores_are_refused(tmp_path, change, says):
    filled(tmp_path / "store")
    change(tmp_path / "store")
    with pytest.raises((ValueError, OSError), match=says):
        contents(FeatureStore(tmp_path / "store"))
        FeatureStore(tmp_path / "store", verify=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ends": torch.arange(10) * 1000}, "outside"),
        ({"ends": torch.tensor([5, -3, *range(10, 18)])}, "outside"),
        ({"ends": torch.tensor([2, 1, *range(10, 18)])}, "outside"),
        ({"names": torch.full((500,), 255, dtype=torch.uint8)}, "not UTF-8"),
    ],
)
def test_damaged_names_are_refused(tmp_path, changes, says):
    filled(tmp_path / "store")
    damage_block(**changes)(tmp_path / "store")
    store = FeatureStore(tmp_path / "store")
    with pytest.raises(ValueError, match=rf"block-.*damaged.*{says}"):
        store.names([1])
    with pytest.raises(ValueError, match=rf"block-.*damaged.*{says}"):
        list(store.all_names())


def test_places_outside_are_refused(tmp_path):
    store = filled(tmp_path / "store")
    for clip in (-1, 25):
        with pytest.raises(IndexError, match=f"no clip {clip}; the store has 25"):
            store.names([clip])
    for first, last in ((-1, 3), (5, 26), (9, 8)):
        with pytest.raises(IndexError, match=f"clips {first} to {last}"):
            list(store.read(first, last))


def test_a_reader_beside_a_writer(tmp_path):
    """It sees the store as it was, or is told to open it anew where the last block gave way to a fuller one."""
    before = filled(tmp_path / "store")
    with before.writer(block_bytes=240) as writer:
        writer.append(names(1, 25), numbers(1, 6))
    assert len(before) == 25 and torch.equal(torch.cat([part.features for part in before.read(0, 20)]), numbers(25, 6)[:20])
    with pytest.raises(OSError, match="open it again"):
        list(before.read())


def test_opened_while_a_writer_replaces_the_last_block(tmp_path, monkeypatch):
    stale = filled(tmp_path / "store").index
    with FeatureStore(tmp_path / "store").writer(block_bytes=240) as writer:
        writer.append(names(1, 25), numbers(1, 6))
    read = store_module._read_index
    indices = [stale]  # read just before its last file went
    monkeypatch.setattr(store_module, "_read_index", lambda folder: indices.pop() if indices else read(folder))
    assert len(FeatureStore(tmp_path / "store")) == 26


def test_of_the_names_only_those_of_hits_are_read(tmp_path, monkeypatch):
    store = filled(tmp_path / "store", 250, 100)
    opened, read = store.open_block, []

    class Watched:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.__exit__(None, None, None)

        def get_slice(self, name):
            view = self.file.get_slice(name)

            class Slice:
                get_shape = view.get_shape

                def __getitem__(self, place):
                    read.append((name, len(view[place])))
                    return view[place]

            return Slice()

    monkeypatch.setattr(store, "open_block", lambda number: Watched(opened(number)))
    assert store.names([7, 100, 249]) == [names(250)[i] for i in (7, 100, 249)]
    assert len(read) == 6 and all(count <= (2 if name == "ends" else 30) for name, count in read)
