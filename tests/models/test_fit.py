from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from i2v_models import FitConfig, build, checkpoint, evaluate, fit, predict
from i2v_models.fit import Trainer, learning_rate, parameter_groups

from .conftest import ClipList, tiny_clip


def video_model(method: str = "st_adapter", **options):
    torch.manual_seed(0)
    return build(tiny_clip(), method, frames=4, head="linear", captions=["a", "b"], **options)


def config(**changes) -> FitConfig:
    return FitConfig(**{"epochs": 4, "lr": 1e-2, "log_every": 1, "save_every": 2, **changes})


def losses(log) -> list[float]:
    return [line["loss"] for line in log]


def assert_same_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("method", ["st_adapter", "aim"])
def test_learns_what_a_frame_mean_cannot(method):
    options = {"accumulate": 1, "epochs": 20, "lr": 5e-3, "warmup": 0.1}
    model, blind = video_model(method), video_model("frame_mean")
    fit(model, ClipList(), config(**options))
    fit(blind, ClipList(), config(**options))
    assert evaluate(model, ClipList())["top1"] == 1.0
    assert evaluate(blind, ClipList())["top1"] < 1.0


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2, "save_every": 1}, {"log_every": 3, "save_every": 4}, {"precision": "fp16"}],
    ids=["plain", "accumulate", "between_log_lines", "scaler"],
)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, changes):
    whole = video_model(checkpointing=True)
    expected = fit(whole, ClipList(), config(output=str(tmp_path / "whole"), **changes))

    output = tmp_path / "cut"
    cut = Trainer(video_model(checkpointing=True), ClipList(), config(output=str(output), **changes))
    save, saved = cut.save, []

    def save_then_die():
        save()
        saved.append(cut.step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    cut.save = save_then_die
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    assert 0 < cut.step < cut.steps
    with open(output / "log.jsonl", "a") as file:  # what a run writes between its last checkpoint and a kill
        file.write(json.dumps({"step": cut.step + 1, "loss": 99.0}) + '\n{"step": 1')
    resumed = video_model(checkpointing=True)
    fit(resumed, ClipList(), config(output=str(output), **changes))
    assert_same_weights(whole.trainable_state_dict(), resumed.trainable_state_dict())
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"], line["lr"]) for line in log] == [
        (line["step"], line["loss"], line["lr"]) for line in expected
    ]


def test_a_finished_run_is_left_alone(tmp_path):
    first = video_model()
    fit(first, ClipList(), config(output=str(tmp_path)))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["bad_videos.json", "checkpoint-00000010", "checkpoint-00000012", "config.json", "log.jsonl"]
    again = video_model()
    assert fit(again, ClipList(), config(output=str(tmp_path))) == []
    assert_same_weights(first.trainable_state_dict(), again.trainable_state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert json.loads((tmp_path / "bad_videos.json").read_text()) == {"broken_0.mp4": "no video stream"}


@pytest.mark.parametrize("damage", ["weights.safetensors", "state.pt"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    fit(video_model(), ClipList(), config(output=str(tmp_path)))
    broken = tmp_path / "checkpoint-00000012" / damage
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.warns(UserWarning, match="checkpoint-00000012 cannot be read"):
        assert checkpoint.load(tmp_path).step == 10
    (tmp_path / "checkpoint-00000010" / damage).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(OSError, match="none of the 2 checkpoints"):
        checkpoint.load(tmp_path)


def test_checkpoints_run_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "went off").touch, ())

    checkpoint.save(tmp_path, 1, {}, {"optimizer": Bomb()})
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(OSError, match="none of the 1"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "went off").exists()


def test_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    fit(video_model(), ClipList(), config(output=str(tmp_path), steps=4))
    leftover = tmp_path / ".checkpoint-00000009.tmp"
    leftover.mkdir()
    (leftover / "state.pt").write_bytes(b"half")
    assert checkpoint.load(tmp_path).step == 4
    checkpoint.save(tmp_path, 6, {"w": torch.ones(1)}, {})
    assert not leftover.exists()
    assert sorted(path.name for path in tmp_path.glob("check*")) == ["checkpoint-00000004", "checkpoint-00000006"]


def test_another_config_is_refused_by_field(tmp_path):
    fit(video_model(), ClipList(), config(output=str(tmp_path), steps=4), record={"classes": ["a", "b"]})
    with pytest.raises(ValueError, match=r"resume .*: classes was \['a', 'b'\], is \['a'\]; lr was 0.01, is 0.02;"):
        fit(video_model(), ClipList(), config(output=str(tmp_path), steps=4, lr=0.02), record={"classes": ["a"]})
    log = fit(video_model(), ClipList(), config(output=str(tmp_path), steps=4, save_every=1), record={"classes": ["a", "b"]})
    assert log == []  # how often it saves changes no number


def test_nan_stops_before_a_checkpoint_is_overwritten(tmp_path):
    trainer = Trainer(video_model(), ClipList(), config(output=str(tmp_path), log_every=100))
    trainer.model.head.register_forward_hook(lambda head, args, out: out * (float("nan") if trainer.step >= 5 else 1))
    with pytest.raises(FloatingPointError, match="loss is nan at step 6"):
        trainer.run()
    assert checkpoint.load(tmp_path).step == 4


def test_learning_rate_warms_up_then_falls_to_zero():
    settings = config(lr=0.4, warmup=0.2)
    rates = [learning_rate(settings, step, 10) for step in range(10)]
    expected = [0.2, 0.4] + [0.2 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx(expected)


def test_no_weight_decay_on_biases_norms_and_embeddings():
    model = video_model("aim", train_backbone=True)
    decayed, spared = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in spared["params"]}
    assert {"method.temporal_embedding", "clip.visual.class_embedding", "clip.visual.positional_embedding"} <= spared
    assert {name for name in spared if not name.endswith(("bias", "embedding"))} == {
        name for name in names.values() if name.endswith("weight") and "ln_" in name and "visual" in name
    } | {"method.ln_post.weight"}
    assert "head.fc.weight" in {names[id(parameter)] for parameter in decayed["params"]}


def test_accumulation_is_the_larger_batch():
    models = []
    for size, accumulate in ((4, 1), (2, 2)):
        models.append(video_model("tokshift"))
        fit(models[-1], ClipList(batch_size=size), config(accumulate=accumulate, steps=3, seed=1))
    assert models[0].head.dropout.p == 0  # else other batches would draw other masks
    for one, other in zip(models[0].trainable_state_dict().values(), models[1].trainable_state_dict().values()):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_clipping_bounds_the_step_but_logs_the_norm():
    free = fit(video_model(), ClipList(), config(clip_norm=0, steps=1))
    model = video_model()
    seen = []
    trainer = Trainer(model, ClipList(), config(clip_norm=1e-3, steps=1))
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(nn.utils.get_total_norm([p.grad for p in trainer.parameters]))
    )
    clipped = trainer.run()
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] > 1e-3
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)


def test_gradient_norm_is_that_of_the_loss_not_of_the_scaled_loss():
    norms = [fit(video_model(), ClipList(), config(precision=p, steps=1))[0]["grad_norm"] for p in ("fp32", "fp16")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_same_seed_same_run_other_seed_other_run():
    runs = [losses(fit(video_model(), ClipList(seed=seed), config(seed=seed))) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_nothing_to_train_and_nothing_to_read_are_said():
    with pytest.raises(ValueError, match="nothing to train"):
        fit(build(tiny_clip(), "frame_mean", captions=["a"]), ClipList(), config())
    with pytest.raises(ValueError, match="the loader has no batch"):
        fit(video_model(), ClipList(count=2), config())


def test_evaluate_averages_probabilities_over_views_and_skips_unreadable_videos():
    model = video_model("tokshift").eval()
    nn.init.normal_(model.head.fc.weight, generator=torch.Generator().manual_seed(0))

    class Views(ClipList):
        """Clips 2i and 2i + 1 are views of video i, labelled i % 2; clip 3 could not be read, nor could video 5."""

        def __iter__(self):
            for batch in super().__iter__():
                batch.valid = (batch.item != 3) & (batch.item < 10)
                batch.label, batch.item = batch.item // 2 % 2, batch.item // 2
                yield batch

    clips = predict(model, ClipList().frames)
    expected = [(clips[2 * i] + clips[2 * i + 1]) / 2 if i != 1 else clips[2] for i in range(5)]
    result = evaluate(model, Views())
    assert [line["prediction"] for line in result["predictions"]] == [int(p.argmax()) for p in expected]
    assert [line["probability"] for line in result["predictions"]] == pytest.approx([float(p.max()) for p in expected])
    hits = sum(int(p.argmax()) == i % 2 for i, p in enumerate(expected))
    assert (result["videos"], result["top1"], result["top5"]) == (5, hits / 5, 1.0)
    swapped = evaluate(model, Views(), class_index=[1, 0])
    assert swapped["top1"] == pytest.approx(1 - hits / 5)
