"""TextConditionedPool: X-Pool's layer and its similarities, whole and folded, in every dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.memory import peak
from bench.published import XPool, XPoolSimilarity
from i2v_kernels import contrastive_loss
from i2v_kernels.nn import TextConditionedPool, text_conditioned_pool

CHANNELS = 48


def pair(heads=1, dropout=0.0, dtype=torch.float64):
    """Ours and the published one, with the weights of a trained one."""
    torch.manual_seed(0)
    plain = XPool(CHANNELS, heads, dropout).double()
    for p in plain.parameters():
        p.data += 0.1 * torch.randn_like(p) if p.dim() < 2 else CHANNELS**-0.5 * torch.randn_like(p)
    plain = plain.to(dtype)
    layer = TextConditionedPool(CHANNELS, heads, dropout).to(dtype)
    layer.load_state_dict(plain.state_dict())
    return layer, plain


def drawn(texts=20, videos=4, frames=6, dtype=torch.float64):
    return torch.randn(texts, CHANNELS, dtype=torch.float64).to(dtype), torch.randn(videos, frames, CHANNELS).to(dtype)


def cosines(text, out):
    return torch.cosine_similarity(text[:, None], out.transpose(0, 1), dim=-1)


def published(layer, text, video, mask):
    """Video by video, of its valid frames."""
    if mask is None:
        return layer(text, video)
    out = []
    for frames, valid in zip(video, mask):
        if valid.any():
            out.append(layer(text, frames[valid][None])[0])
        else:
            y = layer.layer_norm2(text.new_zeros(text.shape))
            out.append(layer.layer_norm3(y + layer.dropout(layer.linear_proj(y))))
    return torch.stack(out)


MASK = torch.tensor([[True] * 6, [True, False] * 3, [False] * 6, [False] * 5 + [True]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("texts", [1, 6, 7, 20])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("what", ["forward", "similarity"])
def test_is_the_published_layer_with_gradients(what, heads, texts, mask):
    layer, plain = pair(heads)
    text, video = drawn(texts)
    leaves = [[x.clone().requires_grad_() for x in (text, video)] for _ in range(2)]
    if mask is not None:
        leaves[0][1].data[~mask] = float("nan")  # of no interest
    got = getattr(layer, what)(*leaves[0], mask=mask)
    want = published(plain, *leaves[1], mask)
    want = cosines(leaves[1][0], want) if what == "similarity" else want
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(want)
    grads = [
        torch.autograd.grad(out, [*given, *module.parameters()], grad, allow_unused=True, materialize_grads=True)
        for out, given, module in ((got, leaves[0], layer), (want, leaves[1], plain))
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("alike", [False, True], ids=["any frames", "frames alike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_those_of_the_published_layer(dtype, alike):
    """Beside the layer in float64 with the same weights, at most 1.5 times as large; frames that hardly differ too."""
    layer, plain = pair(dtype=dtype)
    text, video = drawn(60, 6, 12, dtype)
    if alike:
        video = (video[:, :1] + 0.05 * video).to(dtype)
    exact = copy.deepcopy(plain).double()(text.double(), video.double())
    with torch.no_grad():
        eager, out, similarity = plain(text, video), layer(text, video), layer.similarity(text, video)
    assert out.dtype == dtype and similarity.dtype == torch.float32
    assert error(out, exact) < 1.5 * error(eager, exact)
    want = cosines(text.double(), exact)
    assert error(similarity, want) < 1.5 * error(cosines(text.float(), eager.float()), want)


def test_autocast():
    layer, plain = pair(dtype=torch.float32)
    text, video = drawn(dtype=torch.float32)
    exact = copy.deepcopy(plain).double()(text.double(), video.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager, out, similarity = plain(text, video), layer(text, video), layer.similarity(text, video)
    assert out.dtype == eager.dtype and similarity.dtype == torch.float32
    assert error(out, exact) < 1.5 * error(eager, exact)
    want = cosines(text.double(), exact)
    assert error(similarity, want) < 1.5 * error(cosines(text, eager.float()), want)


def test_begins_as_published():
    layer = TextConditionedPool(8)
    assert set(layer.state_dict()) == set(XPool(8).state_dict())
    for name, value in layer.state_dict().items():
        norm, bias = "norm" in name, name.endswith("bias")
        assert torch.equal(value, torch.zeros(8) if bias else torch.ones(8) if norm else torch.eye(8)), name


@pytest.mark.parametrize("texts", [4, 20])
def test_dropout_drops_the_same(texts):
    layer, plain = pair(dropout=0.4)
    found = []
    for module in (layer, plain):
        torch.manual_seed(3)
        found.append(module(*drawn(texts)))
    torch.testing.assert_close(*found)
    torch.manual_seed(3)
    similarity = layer.similarity(*drawn(texts))
    torch.manual_seed(3)
    text, video = drawn(texts)
    torch.testing.assert_close(similarity, cosines(text, plain(text, video)))


@pytest.mark.parametrize("heads", [1, 3])
def test_chunks_of_texts_change_nothing(heads, monkeypatch):
    layer, _ = pair(heads)
    text, video = (x.requires_grad_() for x in drawn(23))
    found = []
    for size in (16 << 20, 5 * 4 * 6 * 8, 1):
        monkeypatch.setitem(text_conditioned_pool.CHUNK, "cpu", size)
        out = layer.similarity(text, video, mask=MASK)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad(out, [text, video, *layer.parameters()], grad, allow_unused=True, materialize_grads=True)
        found.append([out, *grads])
        with torch.no_grad():
            torch.testing.assert_close(layer.similarity(text, video, mask=MASK), out)
    for others in found[1:]:
        for one, other in zip(found[0], others):
            torch.testing.assert_close(one, other)


def test_trains_in_chunks_of_the_loss():
    layer, _ = pair()
    text, video = (x.requires_grad_() for x in drawn(4))
    inputs, found = [text, video, *layer.parameters()], []
    for chunk in (4, 3):
        loss = contrastive_loss(text, video, scale=5.0, similarity=layer.similarity, chunk=chunk)
        found.append([loss, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_that_others_changed_are_called():
    for path in ("linear_proj", "layer_norm3", "cross_attn.out_proj", "layer_norm2", "dropout"):
        layer, plain = pair()
        for module in (layer, plain):
            module.get_submodule(path).register_forward_hook(lambda module, args, out: 1.5 * out + 0.1)
        text, video = drawn()
        torch.testing.assert_close(layer(text, video), plain(text, video))
        torch.testing.assert_close(layer.similarity(text, video), cosines(text, plain(text, video)))


def test_zeros():
    layer, _ = pair()
    nn.init.zeros_(layer.layer_norm3.weight), nn.init.zeros_(layer.layer_norm3.bias)
    text, video = (x.requires_grad_() for x in drawn())
    out = layer.similarity(text, video)
    assert not out.any() and not torch.autograd.grad(out.sum(), text)[0].any()
    layer, _ = pair()
    text.data[2] = 0
    assert not layer.similarity(text, video)[2].any()


def test_similarities_take_a_part_of_the_memory():
    """128 texts and videos of 256 channels: 16 MiB for each tensor of pooled videos, 0.8 for one of a number a frame."""
    plain, layer = XPoolSimilarity(256, dropout=0.0), TextConditionedPool(256, dropout=0.0)
    text, video = torch.randn(128, 256), torch.randn(128, 12, 256)

    def step(call, module):
        torch.autograd.grad(call(text, video).square().sum(), list(module.parameters()))

    mine, whole = (peak(lambda m=m, f=f: step(f, m), "cpu") for m, f in ((layer, layer.similarity), (plain, plain)))
    assert mine < 0.25 * whole, (mine, whole)


x, y = torch.randn(3, 8), torch.randn(2, 5, 8)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: TextConditionedPool(0), ValueError, "channels=0"),
        (lambda: TextConditionedPool(8, heads=3), ValueError, "heads=3 does not divide channels=8"),
        (lambda: TextConditionedPool(8, heads=1.0), TypeError, "heads=1.0"),
        (lambda: TextConditionedPool(8, dropout=1.5), ValueError, "dropout=1.5"),
        (lambda: TextConditionedPool(8, dropout="no"), TypeError, "dropout='no'"),
        (lambda: TextConditionedPool(8)(y, y), ValueError, "text.shape=(2, 5, 8)"),
        (lambda: TextConditionedPool(8)(x, x), ValueError, "video.shape=(3, 8)"),
        (lambda: TextConditionedPool(8)(x, y[:, :0]), ValueError, "at least one frame"),
        (lambda: TextConditionedPool(8).similarity(x, y, mask=torch.ones(2, 5)), TypeError, "mask must be a bool tensor"),
        (lambda: TextConditionedPool(8).similarity(x, y.double()), TypeError, "video.dtype=torch.float64"),
    ],
)
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert text in str(raised.value) and "TextConditionedPool" in str(raised.value)
