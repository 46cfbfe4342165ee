"""Two processes, started once: they train and test as one, resume from one state, and fail together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from i2v_models import checkpoint, evaluate, fit

from .conftest import ClipList, two_processes
from .test_fit import assert_same_weights, config, losses, video_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return two_processes(Path(__file__).with_name("ranks.py"), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def seen(folder) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_train_as_one_with_the_whole_batch(folder, seen):
    one, other = (ranks["whole"] for ranks in seen)
    assert_same_weights(one[0], other[0])
    single = video_model("tokshift", train_backbone=True)
    log = fit(single, ClipList(batch_size=4), config(steps=6))
    assert losses(one[1]) == pytest.approx(losses(log), rel=1e-3)
    for name, value in single.trainable_state_dict().items():
        torch.testing.assert_close(one[0][name], value, atol=2e-3, rtol=2e-2)
    assert checkpoint.load(folder / "whole").step == 6
    bad = (folder / "whole" / "bad_videos.json").read_text()
    assert "broken_0.mp4" in bad and "broken_1.mp4" in bad


@pytest.mark.parametrize(("name", "steps", "accumulate"), [("repeats", 4, 1), ("repeats, accumulated", 2, 2)])
def test_repeats_that_fill_up_a_step_count_nothing(seen, name, steps, accumulate):
    """5 clips in batches of 2 on 2 processes: 4, then 1 and 3 repeats, so that one process has no clip of its own."""

    class Whole(ClipList):
        def __len__(self):
            return 2

        def __iter__(self):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(self.epoch))
            for self.yielded, rows in enumerate((order[:4], order[4:]), 1):
                yield self.batch(rows)

    single = video_model("tokshift", train_backbone=True)
    log = fit(single, Whole(count=5), config(steps=steps, accumulate=accumulate))
    for ranks in seen:
        assert losses(ranks[name][1]) == pytest.approx(losses(log), rel=1e-3)
        for key, value in single.trainable_state_dict().items():
            torch.testing.assert_close(ranks[name][0][key], value, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(("name", "first"), [("behind", 2), ("alone", 4)])
def test_what_the_first_process_has_on_its_disk_goes_to_all(seen, name, first):
    whole = seen[0]["whole"]
    for ranks in seen:
        weights, log = ranks[name]
        assert [line["step"] for line in log] == list(range(first + 1, 7))
        assert losses(log) == losses(whole[1])[first:]
        assert_same_weights(weights, whole[0])


def test_they_test_as_one(seen):
    model = video_model("tokshift", train_backbone=True)
    nn.init.normal_(model.head.fc.weight, generator=torch.Generator().manual_seed(0))
    expected = evaluate(model, ClipList(count=5, batch_size=5))
    assert expected["videos"] == 5 and seen[0]["evaluate"] == seen[1]["evaluate"]
    for line, right in zip(seen[0]["evaluate"]["predictions"], expected["predictions"], strict=True):
        assert line | {"probability": 0} == right | {"probability": 0}
        assert line["probability"] == pytest.approx(right["probability"], rel=1e-5)
    assert seen[0]["evaluate"]["top1"] == expected["top1"]
    assert seen[0]["evaluate"]["bad"].keys() == {"broken_0.mp4", "broken_1.mp4"}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("settings", ["processes 0 and 1 differ: lr is 0.1 and 0.2"] * 2),
        ("how often it saves", ["processes 0 and 1 differ: save_every is 2 and 3"] * 2),
        ("data", ["processes 0 and 1 differ: batches is 2 and 3"] * 2),
        ("no share", ["the loader is for process 0 of 1, this is 0 of 2", "the loader is for process 0 of 1, this is 1 of 2"]),
        ("frozen weights", ["processes 0 and 1 differ: frozen weights is"] * 2),
        ("nothing to train", ["ValueError: nothing to train", "process 0 cannot go on: ValueError: nothing to train"]),
        ("label", ["process 1 cannot go on: ValueError: label 9", "ValueError: label 9 of"]),
        ("folder", ["cannot be written"] * 2),
        ("disk", ["log.jsonl cannot be written"] * 2),
        ("nan", ["gradient norm is nan"] * 2),
    ],
)
def test_what_one_process_cannot_do_ends_both(seen, name, texts):
    for ranks, text in zip(seen, texts):
        assert ranks[name] is not None and text in ranks[name]


def test_a_signal_to_one_saves_once_and_ends_both(folder, seen):
    assert [ranks["told"] for ranks in seen] == [143, 143]
    assert checkpoint.load(folder / "told").step == 3
    assert checkpoint.load(folder / "nan").step == 2
