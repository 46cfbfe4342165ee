"""Models whose similarity of texts and videos is a method: DRL and TS2-Net as their authors wrote them, and PyLate's score."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from twins import results

import i2v_kernels as i2v
from i2v_kernels.patching import similarity

WIDTH = 24


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class DRL(nn.Module):
    """The interaction of DRL (475f96c); the towers are left out."""

    def __init__(self, interaction: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(interaction=interaction, cdcr=0)
        self.cross_config = SimpleNamespace(hidden_size=WIDTH)
        self.clip = nn.Module()
        self.clip.logit_scale = nn.Parameter(torch.tensor(1.5))
        if interaction == "wti":
            self.text_weight_fc = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, 1))
            self.video_weight_fc = nn.Linear(WIDTH, 1)

    def wti_interaction(self, text_feat, video_feat, text_mask, video_mask):
        weights = []
        if self.config.interaction == "wti":
            for fc, x, mask in (
                (self.text_weight_fc, text_feat, text_mask),
                (self.video_weight_fc, video_feat, video_mask),
            ):
                weights.append(fc(x).squeeze(2).masked_fill((1 - mask).bool(), float("-inf")).softmax(-1))
        logits = torch.einsum("atd,bvd->abtv", [_unit(text_feat), _unit(video_feat)])
        logits = torch.einsum("abtv,at->abtv", [logits, text_mask])
        logits = torch.einsum("abtv,bv->abtv", [logits, video_mask])
        t2v, v2t = logits.max(dim=-1).values, logits.max(dim=-2).values
        if self.config.interaction == "ti":
            t2v = t2v.sum(2) / text_mask.sum(-1).unsqueeze(1)
            v2t = v2t.sum(2) / video_mask.sum(-1).unsqueeze(0)
        else:
            t2v = torch.einsum("abt,at->ab", [t2v, weights[0]])
            v2t = torch.einsum("abv,bv->ab", [v2t, weights[1]])
        logits = (t2v + v2t) / 2.0
        if self.training:
            logits = self.clip.logit_scale.exp() * logits
        return logits, logits.T, 0.0

    def forward(self, text_feat, video_feat, text_mask, video_mask):
        return self.wti_interaction(text_feat, video_feat, text_mask, video_mask)[0]


class TS2Net(nn.Module):
    """The similarities of TS2-Net (1d9d4d5)."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_config = SimpleNamespace(hidden_size=WIDTH)
        self.clip = nn.Module()
        self.clip.logit_scale = nn.Parameter(torch.tensor(1.5))

    def _over_frames(self, s: Tensor, mask: Tensor) -> Tensor:
        weight = s * mask
        weight = (weight / weight.norm(dim=1, keepdim=True)).masked_fill(~mask, -1e18)
        return self.clip.logit_scale.exp() * ((4 * weight).softmax(1) * s).sum(1).T

    def get_frame_similarity(self, sequence_output, visual_output, attention_mask, video_mask):
        s = torch.einsum("mjk,nlk->mjn", _unit(visual_output), _unit(sequence_output))
        return self._over_frames(s, video_mask.bool().unsqueeze(-1))

    def get_frame_selectedcls_similarity(self, sequence_output, visual_output, attention_mask, video_mask):
        s = torch.einsum("mjk,nlk->mjln", _unit(visual_output), _unit(sequence_output))
        s = ((4 * F.normalize(s, dim=2)).softmax(2) * s).sum(2)
        return self._over_frames(s, video_mask.bool().unsqueeze(-1))

    def forward(self, *args):
        return self.get_frame_selectedcls_similarity(*args) + 0.5 * self.get_frame_similarity(*args)


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    masks = torch.arange(9) < torch.tensor([[9], [1], [4], [6]]), torch.arange(6) < torch.tensor([[6], [3], [1], [5], [2]])
    text, video = torch.randn(4, 9, WIDTH), torch.randn(5, 6, WIDTH) * 3
    if name == "ts2_net":
        return TS2Net(), (text[:, :1].clone(), video, masks[0][:, :1].long(), masks[1].long())
    return DRL(name), (text, video, masks[0].long(), masks[1].long())


NAMES = pytest.mark.parametrize("name", ["wti", "ti", "ts2_net"])


@NAMES
@pytest.mark.parametrize("training", [False, True])
def test_results_and_gradients(name: str, training: bool) -> None:
    plain, inputs = made(name)
    fast = copy.deepcopy(plain.train(training))
    report = i2v.patch(fast)
    assert [row.detail for row in report.rows] == ["late_interaction"], report
    for got, want in zip(results(fast, inputs), results(plain, inputs), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@NAMES
def test_calls_reach_the_kernel_until_unpatched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = similarity.late_interaction
    monkeypatch.setattr(similarity, "late_interaction", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    model, inputs = made(name)
    names = set(vars(model))
    i2v.patch(model)
    calls.clear()
    model(*inputs)
    assert len(calls) == (2 if name == "ts2_net" else 1)
    twin = copy.deepcopy(model)
    twin(*inputs)
    assert len(calls) == (4 if name == "ts2_net" else 2)  # a copy runs by its own weights
    assert i2v.patch(model).rows[0].detail.endswith("(already)")
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    i2v.unpatch(model)
    calls.clear()
    model(*inputs)
    assert not calls and set(vars(model)) == names


def test_what_is_not_covered_runs_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("wti")
    i2v.patch(model)
    model.train().config.cdcr = 1  # DRL's decorrelation loss needs the places of maxima
    monkeypatch.setattr(similarity, "late_interaction", None)
    assert torch.equal(model.wti_interaction(*inputs)[0], DRL.wti_interaction(model, *inputs)[0])
    monkeypatch.undo()
    ts2, sentences = made("ts2_net")
    i2v.patch(ts2)
    several = (torch.randn(4, 3, WIDTH), *sentences[1:])
    got = ts2.get_frame_selectedcls_similarity(*several)
    torch.testing.assert_close(got, TS2Net.get_frame_selectedcls_similarity(ts2, *several), rtol=0, atol=0)


def test_another_interaction_is_left_alone() -> None:
    model, _ = made("wti")
    model.config.interaction = "dp"
    assert not i2v.patch(model).rows


class Softer(DRL):
    """A fork that computes something else."""

    def wti_interaction(self, *args):
        logits, _, rest = super().wti_interaction(*args)
        return logits * 0.9, (logits * 0.9).T, rest


def test_a_fork_that_differs_stays_as_it_is() -> None:
    model = Softer("wti")
    (row,) = i2v.patch(model).rows
    assert not row.replaced and "a trial gave other outputs" in row.detail, row
    assert "wti_interaction" not in vars(model)


def test_colbert_scores() -> None:
    """The example of PyLate's documentation."""
    queries = torch.tensor([[[1.0], [0], [0], [0]], [[0], [2.0], [0], [0]], [[0], [0], [3.0], [0]]])
    documents = torch.tensor([[[10.0], [0], [1]], [[0], [100.0], [10]], [[1], [0], [1000.0]]])
    valid = torch.tensor([[1.0, 1, 1], [1, 0, 1], [1, 1, 1]])
    spoken = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]])
    want = torch.tensor([[10.0, 10, 1000], [20, 20, 2000], [0, 0, 0]])
    assert torch.equal(i2v.colbert_scores(queries, documents, spoken, valid), want)
    assert torch.equal(i2v.colbert_scores(queries.tolist(), documents.numpy(), spoken.tolist(), valid.numpy()), want)
