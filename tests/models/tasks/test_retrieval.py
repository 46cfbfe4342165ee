"""Retrieval: the loss, which captions it takes, what is trained and saved, and the test of both directions."""

from __future__ import annotations

import math
import warnings
from functools import cache

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer

from i2v_models import build, checkpoint, fit
from i2v_models.batches import valid_part
from i2v_models.config import TrainConfig
from i2v_models.fit import Trainer
from i2v_models.retrieval import retrieval_metrics
from i2v_models.tasks import Retrieval
from i2v_models.tasks.captions import drawn
from i2v_models.tasks.retrieval import evaluate_retrieval

from ..conftest import ClipList, tiny_clip
from ..test_fit import assert_same_weights, config, losses
from ..test_steps import WithFillers

WORDS = ["red", "green", "blue", "black", "white", "pink", "brown", "grey", "gold", "cyan", "lime", "navy"]
UNLIKE = [[f"a {word} dog", f"{word} is the sky"] for word in WORDS]  # two captions of each clip, all of them different
MANY = [[f"{text} {number}" for text in texts for number in range(15)] for texts in UNLIKE]  # 30 of each
ORDER = [["dark, then bright"], ["bright, then dark"]] * 6  # of ClipList's clips: what their frames' order alone tells


@cache
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=16)


def video_model(method: str = "st_adapter", **options):
    torch.manual_seed(0)
    return build(tiny_clip(), method, frames=4, head="retrieval", **options)


def retrieval(captions=UNLIKE) -> Retrieval:
    return Retrieval(captions, tokenizer())


def loss_of(task: Retrieval, model, rows: list[int], settings=None, epoch: int = 0) -> torch.Tensor:
    """The mean over the clips ``rows`` of ClipList."""
    settings = settings or config()
    clips = valid_part(ClipList().batch(torch.tensor(rows)), epoch)
    return task.loss(model, task.forward(model, clips, settings), [len(rows)], settings) / len(rows)


def test_the_loss_is_open_clips():
    model, rows = video_model(train_backbone=True), [5, 2, 9, 0]
    captions = [drawn(UNLIKE[row], 0, 3, row) for row in rows]
    loss = loss_of(retrieval(), model, rows, epoch=3)
    text = F.normalize(model.clip.encode_text(tokenizer()(captions)), dim=-1)
    video = F.normalize(model.encode(ClipList().frames[rows]), dim=-1)
    expected = open_clip.ClipLoss()(video, text, model.head.logit_scale.exp())
    torch.testing.assert_close(loss, expected)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    for name, one, other in zip(names, *(torch.autograd.grad(x, parameters) for x in (loss, expected))):
        torch.testing.assert_close(one, other, msg=name)


def test_clips_with_one_caption_are_not_held_against_each_other():
    model = video_model()
    captions = [["a dog"], ["a cat"], ["a dog"], ["a bird"]]
    text = F.normalize(model.encode_text(tokenizer()([texts[0] for texts in captions])), dim=-1)
    logits = model.head.logit_scale.exp() * text @ model(ClipList().frames[:4]).T
    expected = 0.0
    for scores in (logits, logits.T):
        for row, others in enumerate(([0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3])):
            expected = expected + scores[row, others].logsumexp(0) - scores[row, row]
    loss = loss_of(retrieval(captions), model, [0, 1, 2, 3])
    torch.testing.assert_close(loss, expected / 8)
    grads = [torch.autograd.grad(x, model.head.logit_scale)[0] for x in (loss, expected / 8)]
    assert torch.isfinite(grads[0])
    torch.testing.assert_close(*grads)
    alike = loss_of(retrieval([["a dog"]] * 4), model, [0, 1, 2, 3])  # none is another's negative
    assert alike.item() == 0


def test_learns_from_captions_what_a_frame_mean_cannot():
    found = []
    for method in ("st_adapter", "frame_mean"):
        model = video_model(method, train_backbone=method == "frame_mean")
        fit(model, ClipList(), config(epochs=20, lr=5e-3), task=retrieval(ORDER))
        found.append(evaluate_retrieval(model, ClipList(), ORDER, tokenizer()))
    assert [(result["texts"], result["videos"], result["chance"]) for result in found] == [(2, 12, 50.0)] * 2
    assert found[0]["text_to_video"]["R@1"] == found[0]["video_to_text"]["R@1"] == 100
    assert found[1]["video_to_text"]["R@1"] < 100


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 2, "save_every": 1, "epochs": 2}, {"precision": "fp16", "steps": 6}],
    ids=["accumulate", "scaler"],
)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, changes):
    seen: dict[str, list[str]] = {"whole": [], "cut": []}

    def task(name: str) -> Retrieval:
        one = retrieval()
        tokenize = one.tokenize
        one.tokenize = lambda captions: (seen[name].extend(captions), tokenize(captions))[1]
        return one

    whole = video_model(train_backbone=True)
    expected = fit(whole, ClipList(), config(output=str(tmp_path / "whole"), **changes), task=task("whole"))
    settings = config(output=str(tmp_path / "cut"), **changes)
    cut = Trainer(video_model(train_backbone=True), ClipList(), settings, task=task("cut"))
    save = cut.save

    def save_then_die():
        save()
        if cut.step >= 2:
            raise KeyboardInterrupt

    cut.save = save_then_die
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    resumed = video_model(train_backbone=True)
    log = fit(resumed, ClipList(), settings, task=task("cut"))
    assert losses(log) == losses(expected)[cut.step :]
    assert_same_weights(whole.trainable_state_dict(), resumed.trainable_state_dict())
    assert seen["cut"] == seen["whole"] and len(set(seen["whole"])) == 24  # both captions of each
    with pytest.raises(ValueError, match=r"captions_digest was '\w+', is '\w+'"):
        fit(video_model(train_backbone=True), ClipList(), settings, task=retrieval(ORDER))


def test_what_is_trained_and_saved(tmp_path):
    frozen, tuned = video_model(), video_model(train_backbone=True)
    adapters = {name for name in frozen.trainable_state_dict() if name.startswith("transformer.resblocks.")}
    assert set(frozen.trainable_state_dict()) == {"logit_scale"} | adapters
    text = {name for name in tuned.clip.state_dict() if not name.startswith(("visual.", "logit_"))}
    assert {name for name in tuned.trainable_state_dict() if name.startswith("text.")} == {f"text.{name}" for name in text}
    before = {name: value.clone() for name, value in frozen.clip.state_dict().items()}
    for model, output in ((frozen, tmp_path / "frozen"), (tuned, tmp_path / "tuned")):
        fit(model, ClipList(), config(output=str(output), epochs=2, weight_decay=0.5), task=retrieval())
    assert_same_weights(frozen.clip.state_dict(), before)
    assert frozen.head.logit_scale != before["logit_scale"]
    changed = {name for name, value in tuned.clip.state_dict().items() if not torch.equal(value, before[name])}
    assert {"token_embedding.weight", "positional_embedding", "text_projection", "visual.proj"} <= changed
    assert "logit_scale" not in changed
    unseen = tokenizer()(["zebra"])[0, 1]  # weight decay would shrink what no step has seen
    assert torch.equal(tuned.clip.token_embedding.weight[unseen], before["token_embedding.weight"][unseen])
    again = video_model(train_backbone=True)
    again.load_trainable_state_dict(checkpoint.load(tmp_path / "tuned").weights)
    assert_same_weights(again.state_dict(), tuned.state_dict())


@pytest.mark.parametrize(("start", "end"), [(4.7, math.log(100)), (-0.5, 0.0)])
def test_the_temperature_stays_where_clip_keeps_it(start, end):
    model = video_model()
    model.head.logit_scale.data.fill_(start)
    fit(model, ClipList(), config(steps=1, lr=1e-6), task=retrieval())
    assert model.head.logit_scale.item() == pytest.approx(end, abs=1e-6)


def test_each_accumulated_batch_has_its_own_negatives():
    batches = list(ClipList(batch_size=4))
    model = video_model()
    parts = [loss_of(retrieval(), model, batch.item.tolist()).item() for batch in batches[:2]]
    (line,) = fit(video_model(), ClipList(batch_size=4), config(steps=1, accumulate=2), task=retrieval())
    assert line["loss"] == pytest.approx(sum(parts) / 2, rel=1e-4)
    whole = loss_of(retrieval(), model, [row for batch in batches[:2] for row in batch.item.tolist()])
    assert whole.item() > line["loss"] + 0.1


def test_clips_that_are_not_valid_change_nothing():
    class Fillers(WithFillers):
        def __iter__(self):
            for batch in super().__iter__():
                batch.item = torch.cat([batch.item, batch.item[: self.fillers]])
                yield batch

    models = [video_model() for _ in range(2)]
    logs = [fit(model, loader, config(epochs=2), task=retrieval()) for model, loader in zip(models, (ClipList(), Fillers(2)))]
    assert losses(logs[0]) == losses(logs[1])
    assert_same_weights(*(model.trainable_state_dict() for model in models))


def test_what_cannot_be_trained_is_said():
    class Nameless(ClipList):
        def batch(self, *arguments):
            batch = super().batch(*arguments)
            del batch.item
            return batch

    for model, loader, captions, text in (
        (build(tiny_clip(), captions=["a"], frames=4), ClipList(), UNLIKE, "the model has no head='retrieval'"),
        (build(tiny_clip(), head=None, frames=4), ClipList(), UNLIKE, "the model has no head='retrieval'"),
        (video_model("frame_mean"), ClipList(), UNLIKE, "nothing to train: FrameMean has no parameters; take train_backbone"),
        (video_model(), ClipList(), UNLIKE[:3], "the loader has a video number .*, captions are of 3 videos"),
        (video_model(), Nameless(), UNLIKE, r"does not tell which videos its clips are of \(batch.item\)"),
    ):
        with pytest.raises(ValueError, match=text):
            fit(model, loader, config(), task=retrieval(captions))


@pytest.mark.parametrize(("name", "value"), [("head", "linear"), ("caption", "{} it is"), ("label_smoothing", 0.1)])
def test_settings_that_mean_nothing_here_are_refused(name, value):
    given = {"method": "aim", "data": "videos", "pretrained": "none", name: value}
    with pytest.raises(ValueError, match=f"^{name}={value!r} means nothing to task='retrieval'; leave it out$"):
        TrainConfig(task="retrieval", **given)
    TrainConfig(**given)


def test_a_caption_that_is_cut_is_said_once():
    task = retrieval([["word " * length] for length in (13, 14, 15, 400)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert task.tokenize(["", *(texts[0] for texts in task.captions[:2])]).shape == (3, 16)
    with pytest.warns(UserWarning, match="captions longer than the 16 tokens of the text tower are cut; the first is 'word"):
        task.tokenize([texts[0] for texts in task.captions])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.tokenize(task.captions[3])


class Views(ClipList):
    """Clips 2i and 2i + 1 are views of video i; clip 3 could not be read, nor could video 5."""

    def __iter__(self):
        for batch in super().__iter__():
            batch.valid = (batch.item != 3) & (batch.item < 10)
            batch.item = batch.item // 2
            yield batch


def test_the_test_averages_views_and_knows_captions_that_several_videos_have():
    model = video_model()
    captions = [["a dog", "a cat"], ["a dog"], ["a bird", "a bird", "a cow"], ["a horse"], ["a cow", "a dog"], ["a mouse"]]
    texts = ["a dog", "a cat", "a bird", "a cow", "a horse"]
    right = [[0, 1, 4], [0], [2], [2, 4], [3]]
    with torch.no_grad():
        clips = model(ClipList().frames)
        video = torch.stack([clips[[2 * i, 2 * i + 1] if i != 1 else [2]].mean(0) for i in range(5)])
        text = model.encode_text(tokenizer()(texts))
    expected = retrieval_metrics(F.normalize(text, dim=-1) @ F.normalize(video, dim=-1).T, right)
    result = evaluate_retrieval(model, Views(), captions, tokenizer())
    assert {way: result[way] for way in expected} == expected
    assert (result["texts"], result["videos"]) == (5, 5) and result["chance"] == pytest.approx(100 * 8 / 25)
    assert list(result["bad"]) == ["broken_0.mp4"]
    told = retrieval().told(result)
    assert told.splitlines()[0].startswith(f"text to video: R@1 {expected['text_to_video']['R@1']:.1f} %, R@5 100.0 %, ")
    assert told.splitlines()[2] == "of 5 texts and 5 videos; chance: R@1 32 %; left out: 1 that cannot be read"


def test_embeddings_that_are_not_finite_are_no_ranks():
    model = video_model()
    model.method.transformer.resblocks[0]["adapter_pre_mlp"].fc1.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or Inf in precision='fp32'"):
        evaluate_retrieval(model, ClipList(), UNLIKE, tokenizer())
