"""contrastive_loss: the naive formula and open_clip's losses, whatever the chunk, on one process and on several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss

import i2v_kernels as i2v

ROOT = Path(__file__).parents[2]
KINDS = ("softmax", "sigmoid")


def naive(logits, kind):
    count = len(logits)
    if kind == "sigmoid":
        return -F.logsigmoid(logits * (2 * torch.eye(count, dtype=logits.dtype) - 1)).sum() / count
    labels = torch.arange(count)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def leaves(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def words_and_frames(text, weight, video, valid):
    """Of [B, W, D], [B, W], [B, F, D], [B, F]."""
    scores = torch.einsum("awd,vfd->avwf", text, video).masked_fill(~valid[:, None], -10.0)
    return torch.einsum("avw,aw->av", scores.amax(-1), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5, 9])
def test_is_the_formula_with_gradients(kind, chunk):
    text, video, scale, bias = leaves((5, 4), (5, 4), (), ())
    inputs = (text, video, scale, bias)
    got = i2v.contrastive_loss(text, video, scale=scale, bias=bias, kind=kind, chunk=chunk)
    want = naive(scale * text @ video.t() + bias, kind)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got * 3, inputs), torch.autograd.grad(want * 3, inputs)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_small_steps(kind):
    text, weight, video, scale = leaves((4, 2, 3), (4, 2), (4, 3, 3), ())
    valid = torch.tensor([[True, True, False], [True, False, False], [True] * 3, [False] * 3])

    def loss(text, weight, video, scale):
        return i2v.contrastive_loss(
            (text, weight), (video, valid), scale=scale, similarity=words_and_frames, kind=kind, chunk=3
        )

    assert torch.autograd.gradcheck(loss, (text, weight, video, scale))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("published, kind", [(ClipLoss, "softmax"), (SigLipLoss, "sigmoid")])
def test_is_open_clips_on_one_process(published, kind, chunk):
    text, video, scale, bias = leaves((8, 16), (8, 16), (), (), dtype=torch.float32)
    inputs = (text, video, scale, bias)
    want = published()(video, text, scale, bias)
    got = i2v.contrastive_loss(text, video, scale=scale, bias=bias, kind=kind, chunk=chunk)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_float32(kind, dtype, atol):
    text, video = F.normalize(torch.randn(2, 300, 32), dim=-1).to(dtype).requires_grad_()
    text, video = text.detach().requires_grad_(), video.detach().requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (text, video)]
    loss = i2v.contrastive_loss(text, video, scale=20.0, kind=kind, chunk=70)
    want = naive(20 * exact[0] @ exact[1].t(), kind)
    assert loss.dtype == torch.float32
    assert (loss - want).abs() < 2e-3 * want
    for got, x in zip(torch.autograd.grad(loss, (text, video)), torch.autograd.grad(want, exact)):
        assert got.dtype == dtype
        assert (got - x).abs().max() < atol * x.abs().max()


@pytest.mark.parametrize("of", ["a module", "a tensor", "a computed tensor"])
def test_what_the_similarity_closes_over_gets_its_gradient(of):
    text, video, weight = leaves((7, 4), (7, 4), (4, 4))
    module = torch.nn.Linear(4, 4, dtype=torch.float64)
    computed = weight.exp()
    similarity, parameters = {
        "a module": (lambda t, v: module(t) @ v.t(), list(module.parameters())),
        "a tensor": (lambda t, v: t @ weight @ v.t(), [weight]),
        "a computed tensor": (lambda t, v: t @ computed @ v.t(), [weight]),
    }[of]
    found = []
    for chunk in (7, 2):
        loss = i2v.contrastive_loss(text, video, scale=1.0, similarity=similarity, chunk=chunk)
        found.append(torch.autograd.grad(loss, (text, video, *parameters), retain_graph=True))
        (loss + text.sum()).backward(retain_graph=True)
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0
    for x, grad in zip((text, video, *parameters), found[0]):
        torch.testing.assert_close(x.grad, 2 * grad + (2 if x is text else 0))


def test_hooks_on_what_it_closes_over_are_called_once():
    text, video, weight = leaves((7, 4), (7, 4), (4, 4))
    calls = []
    for _ in range(2):
        weight.register_hook(lambda grad: calls.append(grad) or 2 * grad)
    weight.register_post_accumulate_grad_hook(lambda x: calls.append(x.grad))
    grads = []
    for chunk in (7, 2):
        weight.grad = None
        i2v.contrastive_loss(text, video, scale=1.0, similarity=lambda t, v: t @ weight @ v.t(), chunk=chunk).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)
    assert len(calls) == 6


def test_random_numbers_and_autocast_are_the_same_again():
    module = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.Dropout(0.5))
    text, video = leaves((6, 16), (6, 16), dtype=torch.float32)
    drawn = []

    def similarity(text, video):
        hidden = module(text)
        drawn.append(hidden)
        return hidden @ video.t()

    with torch.autocast("cpu", torch.bfloat16):
        loss = i2v.contrastive_loss(text, video, scale=1.0, similarity=similarity, chunk=4)
        after = module(text)  # not with a weight that was cast where autograd did not look
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)  # what is drawn later is not drawn again
    assert loss.dtype == torch.float32 and after.requires_grad
    _, first, second, *again = drawn  # after that of one pair, by which parameters are found
    assert [len(x) for x in drawn[1:]] == [4, 2, 4, 2] and drawn[1].dtype == torch.bfloat16
    for one, other in zip((first, second), again):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert not torch.equal(first[:2] == 0, second == 0)
    before = module[0].weight.grad.clone()
    after.sum().backward()
    assert not torch.equal(before, module[0].weight.grad)


def test_logits_are_never_whole():
    text, video = leaves((64, 8), (64, 8), dtype=torch.float32)
    shapes, alive = [], []

    class Similarity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, text, video):
            ctx.save_for_backward(text, video)
            shapes.append((len(text), len(video)))
            return text @ video.t()

        @staticmethod
        def backward(ctx, grad):
            alive.append(tuple(grad.shape))
            text, video = ctx.saved_tensors
            return grad @ video, grad.t() @ text

    loss = i2v.contrastive_loss(text, video, scale=1.0, similarity=Similarity.apply, chunk=20)
    assert shapes == [(1, 1), (20, 64), (20, 64), (20, 64), (4, 64)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        again = i2v.contrastive_loss(text, video, scale=1.0, similarity=Similarity.apply, chunk=20)
    assert max(saved[-5:]) <= 64 * 8
    loss.backward(), again.backward()
    assert alive == [(20, 64), (20, 64), (20, 64), (4, 64)] * 2


def test_a_batch_of_its_own_size_is_cut_by_itself():
    """4,096 pairs: 64 MiB of logits, 4 at a time."""
    seen = []

    def similarity(text, video):
        seen.append(len(text))
        return (text @ video.t()).float()

    text = torch.randn(4096, 2)
    with torch.no_grad():
        i2v.contrastive_loss(text, text, scale=1.0, similarity=similarity)
    assert seen == [256] * 16


def test_without_gradients_nothing_is_recorded():
    text, video = leaves((4, 3), (4, 3))
    with torch.no_grad():
        loss = i2v.contrastive_loss(text, video, scale=1.0, chunk=2)
    assert not loss.requires_grad
    fixed = i2v.contrastive_loss(text.detach(), video.detach(), scale=1.0, chunk=2)
    assert not fixed.requires_grad and torch.equal(fixed, loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told(value, kind):
    text, video = torch.randn(2, 6, 3)
    text[4, 1] = value
    assert not i2v.contrastive_loss(text, video, scale=1.0, kind=kind, chunk=2).isfinite()


def test_second_derivatives_are_refused_in_chunks_and_given_at_once():
    text, video = leaves((4, 3), (4, 3))
    (grad,) = torch.autograd.grad(i2v.contrastive_loss(text, video, scale=1.0), text, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), video)[0].abs().max() > 0
    loss = i2v.contrastive_loss(text, video, scale=1.0, chunk=2)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        torch.autograd.grad(loss, text, create_graph=True)


x = torch.randn(4, 3)


@pytest.mark.parametrize(
    "args, kwargs, error, text",
    [
        ((1.0, x), {}, TypeError, "text must be a tensor [B, ...] or several, got float"),
        ((x, "x"), {}, TypeError, "video must be a tensor"),
        ((x, (None,)), {}, ValueError, "video=(None,), but at least one tensor"),
        ((x, (x, 3)), {}, TypeError, "video[1] must be a tensor [B, ...] or None, got int"),
        ((x, x[:3]), {}, ValueError, "video[0].shape=(3, 3), but text[0] has 4 rows"),
        ((x, x[:, :2].contiguous()), {}, ValueError, "video.shape=(4, 2)"),
        ((x, x.double()), {}, TypeError, "video.dtype=torch.float64"),
        ((x[:0], x[:0]), {}, ValueError, "text.shape=(0, 3), but at least one pair"),
        ((x, x.to("meta")), {}, ValueError, "video[0] is on meta"),
        (((x, x), x), {}, ValueError, "2 tensors in text, but without similarity"),
        ((x, x), {"similarity": "dot"}, TypeError, "similarity='dot'"),
        ((x, x), {"similarity": lambda t, v: t}, ValueError, "similarity gave a tensor (4, 3), but [a, v] = (4, 4)"),
        ((x, x), {"similarity": lambda t, v: None}, ValueError, "similarity gave None"),
        ((x, x), {"kind": "hinge"}, ValueError, "kind='hinge' is not one of 'softmax', 'sigmoid'"),
        ((x, x), {"chunk": 0}, ValueError, "chunk=0 must be at least 1"),
        ((x, x), {"chunk": 1.5}, TypeError, "chunk=1.5"),
        ((x, x), {"scale": "big"}, TypeError, "scale='big' must be a number or a tensor of one"),
        ((x, x), {"scale": torch.ones(2)}, ValueError, "scale must be one number, got torch.float32 of shape (2,)"),
        ((x, x), {"bias": torch.tensor(1)}, ValueError, "bias must be one number, got torch.int64"),
        ((x, x), {"group": "all"}, ValueError, "group='all', but torch.distributed is not initialized"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, text):
    with pytest.raises(error) as raised:
        i2v.contrastive_loss(*args, **{"scale": 1.0, **kwargs})
    assert text in str(raised.value) and str(raised.value).startswith("contrastive_loss: ")


def test_a_similarity_that_changes_its_mind_is_refused():
    text, video, weight = leaves((4, 3), (4, 3), (3,))

    def similarity(text, video):
        return (text * weight if len(text) > 1 else text) @ video.t()

    loss = i2v.contrastive_loss(text, video, scale=1.0, similarity=similarity, chunk=2)
    with pytest.raises(RuntimeError, match="that it did not use for a single pair"):
        loss.backward()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("contrastive_ranks.py")), str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize(
    "name",
    [
        *(f"{loss} of {world}, chunk={chunk}" for loss in ("ClipLoss", "local ClipLoss", "SigLipLoss") for world in (2, 4)
          for chunk in (None, 2)),
        "unlike shares, softmax", "unlike shares, sigmoid", "groups", "DistributedDataParallel",
    ],
)  # fmt: skip
def test_on_several_processes(ranks, name):
    found = [seen[name] for seen in ranks if name in seen]
    assert len(found) == (2 if " of 2" in name else 4)
    for got, want in found:
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)
    if name != "groups":
        assert all(torch.equal(got[0], found[0][0][0]) for got, _ in found)


def test_processes_that_do_not_agree_all_say_so(ranks):
    for seen in ranks:
        assert "processes 0 and 2 differ" in seen["another gradient"]
        assert "process 1 has no pair" in seen["no pair"]
