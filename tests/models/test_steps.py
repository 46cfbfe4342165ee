"""What a step counts and what it refuses to keep: NaN, overflow in fp16, clips that are not valid, labels that are no class."""

from __future__ import annotations

import json

import pytest
import torch

from i2v_models import checkpoint, fit
from i2v_models.fit import Trainer

from .conftest import ClipList
from .test_fit import assert_same_weights, config, losses, video_model


def spoil(trainer: Trainer, factor: float, steps) -> None:
    """Multiply a gradient, and nothing of the loss, in these steps (counted from 1)."""
    parameter = trainer.model.head.fc.weight
    parameter.register_hook(lambda grad: grad * (factor if trainer.step + 1 in steps else 1))


@pytest.mark.parametrize("bad", [6, 12], ids=["in the middle", "in the last step"])
@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_a_nan_gradient_of_a_finite_loss_is_not_kept(tmp_path, bad, clip_norm):
    trainer = Trainer(video_model(), ClipList(), config(output=str(tmp_path), clip_norm=clip_norm, log_every=4))
    spoil(trainer, float("nan"), [bad])
    with pytest.raises(FloatingPointError, match=f"norm is nan .*at step {bad}; the newest checkpoint is of step {bad - 2}"):
        trainer.run()
    assert checkpoint.load(tmp_path).step == bad - 2
    assert all(step < bad for step in (json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()))


def test_a_nan_gradient_is_said_without_an_output_too():
    trainer = Trainer(video_model(), ClipList(), config())
    spoil(trainer, float("inf"), [12])
    with pytest.raises(FloatingPointError, match=r"gradient norm is (inf|nan) .*at step 12; there is no checkpoint"):
        trainer.run()


def test_steps_that_fp16_skips_are_counted_and_leave_the_weights(tmp_path, capsys):
    trainer = Trainer(video_model(), ClipList(), config(output=str(tmp_path), precision="fp16", steps=6))
    spoil(trainer, float("inf"), [2, 4])
    log = trainer.run()
    assert [line["skipped"] for line in log] == [0, 1, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in log] == [False, True, False, True, False, False]
    assert "2 steps skipped by fp16" in capsys.readouterr().err
    assert checkpoint.load(tmp_path).state["skipped"] == 2
    again = Trainer(video_model(), ClipList(), config(output=str(tmp_path), precision="fp16", steps=6))
    assert again.skipped == 2


def test_fp16_does_not_skip_for_ever(tmp_path):
    trainer = Trainer(video_model(), ClipList(), config(precision="fp16", steps=40, log_every=40))
    spoil(trainer, float("nan"), range(3, 100))
    with pytest.raises(FloatingPointError, match=r"gradient norm is nan .*at step 35"):
        trainer.run()


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_checkpoint_with_a_value_that_is_not_finite_is_neither_written_nor_read(tmp_path, where, monkeypatch):
    nan, inf = torch.tensor([1.0, float("nan")]), torch.tensor(float("inf"))
    broken = {"weights": {"w": nan}, "state": {"optimizer": {0: {"v": inf}}}}
    one = {"weights": {"w": torch.ones(2)}, "state": {}}
    checkpoint.save(tmp_path, 1, **one)
    with pytest.raises(FloatingPointError, match=r"(w|optimizer.0.v) is not finite after step 2"):
        checkpoint.save(tmp_path, 2, **one | {where: broken[where]})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "refuse_non_finite", lambda *_: None)
        checkpoint.save(tmp_path, 2, **one | {where: broken[where]})
    with pytest.warns(UserWarning, match="checkpoint-00000002 cannot be read .*not finite"):
        assert checkpoint.load(tmp_path).step == 1


def test_weights_that_overflow_in_the_last_step_are_said():
    trainer = Trainer(video_model(), ClipList(), config(steps=2, warmup=0))
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.model.head.fc.bias.data.fill_(float("inf")))
    trainer.steps = 1
    with pytest.raises(FloatingPointError, match=r"fc.bias is not finite after step 1"):
        trainer.run()


class WithFillers(ClipList):
    """Every batch ends with ``fillers`` clips that are not valid, of another label, path and picture."""

    def __init__(self, fillers: int, **options) -> None:
        super().__init__(**options)
        self.fillers = fillers

    def __iter__(self):
        for batch in super().__iter__():
            batch.frames = torch.cat([batch.frames, 255 - batch.frames[: self.fillers]])
            batch.label = torch.cat([batch.label, torch.full((self.fillers,), -1)])
            batch.valid = torch.arange(len(batch.label)) < len(batch.path)
            batch.path = batch.path + ["filler.mp4"] * self.fillers
            yield batch


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"precision": "fp16"}], ids=["plain", "accumulate", "fp16"])
def test_clips_that_are_not_valid_change_nothing(changes):
    models = [video_model("tokshift", train_backbone=True) for _ in range(2)]
    logs = [
        fit(model, loader, config(label_smoothing=0.1, epochs=2, **changes))
        for model, loader in zip(models, (ClipList(), WithFillers(2)))
    ]
    assert losses(logs[1]) == losses(logs[0])
    assert_same_weights(*(model.trainable_state_dict() for model in models))


def test_the_last_smaller_batch_weighs_as_much_as_its_clips():
    """Of 5 and 1 clips: the mean over 6, not over two batches."""

    class Uneven(ClipList):
        def __iter__(self):
            for batch in super().__iter__():
                for rows in (slice(0, 5), slice(5, 6)):
                    yield type(batch)(**{name: value[rows] for name, value in vars(batch).items()})

    models = [video_model("tokshift") for _ in range(2)]
    (one,) = fit(models[0], ClipList(batch_size=6), config(steps=1))
    (other,) = fit(models[1], Uneven(batch_size=6), config(steps=1, accumulate=2))
    assert [other[key] for key in ("loss", "grad_norm")] == pytest.approx([one[key] for key in ("loss", "grad_norm")], rel=1e-4)
    assert models[0].head.dropout.p == 0
    for one, other in zip(models[0].trainable_state_dict().values(), models[1].trainable_state_dict().values()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_batch_without_a_valid_clip_is_passed_over():
    class Holes(ClipList):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                yield batch
                if number == 0:
                    yield type(batch)(**vars(batch) | {"valid": batch.valid & False})

    models = [video_model("tokshift") for _ in range(2)]
    logs = [fit(model, loader, config(steps=4)) for model, loader in zip(models, (ClipList(), Holes()))]
    assert losses(logs[0]) == losses(logs[1])
    assert_same_weights(*(model.trainable_state_dict() for model in models))


@pytest.mark.timeout(60)
def test_nothing_valid_at_all_is_said():
    class Nothing(ClipList):
        def __iter__(self):
            for batch in super().__iter__():
                batch.valid &= False
                yield batch

    class Empty(ClipList):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="no clip of a whole epoch is valid"):
        fit(video_model(), Nothing(), config())
    with pytest.raises(ValueError, match="gave no batch in a whole epoch"):
        fit(video_model(), Empty(), config())


@pytest.mark.parametrize("label", [-1, -100, 2, 7])
def test_a_label_that_is_no_class_is_named(label):
    """-100 is what PyTorch's cross entropy leaves out without a word."""
    loader = ClipList()
    loader.label[3] = label
    with pytest.raises(ValueError, match=f"label {label} of 3.mp4 is none of the model's 2 classes, 0 to 1"):
        fit(video_model(), loader, config())


def test_a_model_without_a_head_cannot_be_trained_on_labels():
    model = video_model("tokshift", train_backbone=True)
    model.head = None
    with pytest.raises(ValueError, match="no head"):
        fit(model, ClipList(), config())
