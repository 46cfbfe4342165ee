"""Two processes, started once, whose clips are one another's negatives: they learn as one, and fail together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from i2v_models import checkpoint, fit
from i2v_models.tasks.retrieval import evaluate_retrieval

from ..conftest import ClipList, two_processes
from ..test_fit import assert_same_weights, config, losses
from .test_retrieval import MANY, retrieval, tokenizer, video_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return two_processes(Path(__file__).with_name("ranks.py"), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def seen(folder) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


class Whole(ClipList):
    """The five clips of ``Shares``, of both processes at once: four, then one."""

    def __len__(self):
        return 2

    def __iter__(self):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(self.epoch))
        for self.yielded, rows in enumerate((order[:4], order[4:]), 1):
            yield self.batch(rows)


@pytest.mark.parametrize(
    ("name", "single", "changes"),
    [
        ("whole", ClipList(batch_size=4), {"steps": 4}),
        ("repeats", Whole(count=5), {"steps": 4}),
        ("repeats, accumulated", Whole(count=5), {"steps": 2, "accumulate": 2}),
    ],
)
def test_two_processes_train_as_one_with_the_whole_batch(seen, name, single, changes):
    """``repeats``: 5 clips in batches of 2 on 2 processes: 4, then 1 and 3 repeats, so that one has no clip of its own."""
    model = video_model(train_backbone=True)
    log = fit(model, single, config(**changes), task=retrieval())
    assert_same_weights(*(ranks[name][0] for ranks in seen))
    assert losses(seen[0][name][1]) == losses(seen[1][name][1]) == pytest.approx(losses(log), rel=1e-3)
    norms = [[line["grad_norm"] for line in lines] for lines in (seen[0][name][1], log)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for key, value in model.trainable_state_dict().items():
        torch.testing.assert_close(seen[0][name][0][key], value, atol=2e-3, rtol=2e-2)


def test_they_test_as_one(seen):
    expected = evaluate_retrieval(video_model(), ClipList(count=5, batch_size=5), MANY, tokenizer())
    assert expected["texts"] == 150 and seen[0]["evaluate"] == seen[1]["evaluate"]
    assert {**seen[0]["evaluate"], "bad": None, "left_out": None} == {**expected, "bad": None, "left_out": None}
    assert seen[0]["evaluate"]["bad"].keys() == {"broken_0.mp4", "broken_1.mp4"}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("captions", ["processes 0 and 1 differ: captions_digest is"] * 2),
        *((f"{where} {n}", ["process 1 cannot go on: RuntimeError: no memory", f"RuntimeError: no memory in {where}"])
          for where in ("forward", "loss") for n in (3, 4)),
        *((f"loader {n}", ["process 1 cannot go on: OSError: no such disk", "OSError: no such disk"]) for n in (3, 4)),
        ("both", ["OSError: one", "RuntimeError: other"]),
    ],
)  # fmt: skip
def test_what_one_process_cannot_do_ends_both_wherever_it_is(folder, seen, name, texts):
    for ranks, text in zip(seen, texts):
        assert ranks[name] is not None and text in ranks[name]
    if name != "captions":
        assert checkpoint.load(folder / name.replace(" ", "")) is None  # of save_every=2 steps; the second was not taken


def test_a_signal_to_one_whose_loader_breaks_ends_both_at_the_step_before(seen):
    assert [ranks["told"] for ranks in seen] == [[143, 2], [143, 2]]


def test_rows_of_all_processes(seen):
    assert all(torch.equal(ranks["joined"], torch.ones(1, 2)) for ranks in seen)
