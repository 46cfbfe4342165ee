"""The decoder layers of EVL and UniFormerV2 beside what their papers say, folded and not."""

from __future__ import annotations

import copy
import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F

from i2v_kernels import nn
from i2v_kernels.nn.functional import projected_cross_attention

CHANNELS, HEADS = 48, 3
LAYERS = {
    "EVL": lambda: nn.EVLDecoderLayer(CHANNELS, HEADS),
    "EVL, another width": lambda: nn.EVLDecoderLayer(CHANNELS, HEADS, width=24),
    "UniFormerV2": lambda: nn.UniFormerV2Extractor(CHANNELS, HEADS),
}


def made(kind):
    """With random numbers in place of the zeros and ones that a new layer has."""
    layer = LAYERS[kind]().double()
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator), alpha=0.2)
    return layer


def parts(layer):
    """(norms of x, features and the perceptron; q, k, v and out; the perceptron's layers) under EVL's names or the other."""
    if isinstance(layer, nn.EVLDecoderLayer):
        linear = [(m.weight, m.bias) for m in layer.attn.children()]
        return (layer.norm1, layer.norm3, layer.norm2), linear, (layer.mlp.fc1, layer.mlp.fc2)
    attn = layer.attn
    linear = [*zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)), (attn.out_proj.weight, attn.out_proj.bias)]
    return (layer.ln_1, layer.ln_3, layer.ln_2), linear, (layer.mlp.c_fc, layer.mlp.c_proj)


def published(layer, x, features):
    """As published: project all tokens, scores of all, softmax over them."""
    (of_x, of_features, of_mlp), (q, k, v, out), (first, last) = parts(layer)
    tokens = of_features(features.flatten(1, 2))
    q, k, v = (
        F.linear(y, *affine).unflatten(2, (HEADS, -1)) for y, affine in ((of_x(x), q), (tokens, k), (tokens, v))
    )
    shares = torch.einsum("bqhd,bkhd->bhqk", q / q.shape[-1] ** 0.5, k).softmax(-1)
    x = x + F.linear(torch.einsum("bhqk,bkhd->bqhd", shares, v).flatten(2), *out)
    hidden = first(of_mlp(x))
    return x + last(hidden * torch.sigmoid(1.702 * hidden))


def inputs(queries, frames, sequence_first, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries + frames)
    x = torch.randn(2, queries, CHANNELS, dtype=torch.float64, generator=generator)
    features = 3 + 2 * torch.randn(2, frames, 7, CHANNELS, dtype=torch.float64, generator=generator)
    if sequence_first:  # [N, B * T, C]
        features = features.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    return x.to(dtype).requires_grad_(), features.to(dtype).requires_grad_()


def gradients(function, layer, x, features):
    out = function(x, features)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, [x, features, *layer.parameters()], grad)]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("sequence_first", [False, True], ids=["BTNC", "NBTC"])
@pytest.mark.parametrize("queries, frames", [(1, 4), (2, 1), (1, 1), (4, 4), (9, 3)])  # folded up to 4
@pytest.mark.parametrize("kind", LAYERS)
def test_as_published(kind, queries, frames, sequence_first):
    layer = made(kind)
    x, features = inputs(queries, frames, sequence_first)
    got = gradients(layer, layer, x, features)
    want = gradients(lambda *args: published(layer, *args), layer, x, features)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_precision(kind, dtype):
    """Of output and all gradients together no further from float64 than twice what the published formulation is."""
    exact = made(kind)
    layer = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(layer.state_dict())  # the rounded numbers
    x, features = inputs(1, 4, True, dtype)
    doubles = [t.detach().double().requires_grad_() for t in (x, features)]
    want = gradients(lambda *args: published(exact, *args), exact, *doubles)
    found = gradients(layer, layer, x, features)
    eager = gradients(lambda *args: published(layer, *args), layer, x, features)
    for i, (f, e, w) in enumerate(zip(found, eager, want, strict=True)):
        assert f.dtype == dtype
        scale = max(w.norm().item(), 1e-3 * want[1].norm().item())  # the keys' bias: zero but for rounding
        limit = 2 * (e.double() - w).norm().item() + 4 * torch.finfo(dtype).eps * scale
        assert (f.double() - w).norm().item() <= limit, i


@pytest.mark.parametrize("queries, fold", [(1, True), (4, True), (5, False)])
def test_folds_where_queries_are_few(queries, fold, monkeypatch):
    """4 * Q * H <= C: what the op is called with is one wide head of all queries and heads, or heads of projected keys."""
    seen = []
    real = nn.functional.video_cross_attention
    monkeypatch.setattr(nn.functional, "video_cross_attention", lambda q, *a, **k: seen.append(q.shape) or real(q, *a, **k))
    x, features = inputs(queries, 4, False)
    made("EVL")(x, features)
    wide, narrow = (2, queries * HEADS, 1, CHANNELS), (2, queries, HEADS, CHANNELS // HEADS)
    assert seen == [wide if fold else narrow]


@pytest.mark.parametrize("kind", LAYERS)
def test_mask(kind):
    """Frames that are not valid might as well not be there; of a clip without one, the last bias is left."""
    layer = made(kind)
    x, features = inputs(1, 4, False)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    (norm, *_), (q, k, v, out), _ = parts(layer)
    got = layer(x, features, mask)
    torch.testing.assert_close(got[:1], layer(x[:1], features[:1, [0, 2, 3]]))
    both = [
        projected_cross_attention(norm(x), features, HEADS, q, k, v, out, (torch.ones(CHANNELS).double(), None, 1e-5),
                                  mask=mask, fold=fold)
        for fold in (True, False)
    ]  # fmt: skip
    torch.testing.assert_close(*both)
    torch.testing.assert_close(both[0][1, 0], out[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_without_norm_and_biases(kind):
    _, linear, _ = parts(made(kind))
    q, k, v, out = ((weight, None) for weight, _ in linear)
    x, features = inputs(1, 4, False)
    folded, projected = (projected_cross_attention(x, features, HEADS, q, k, v, out, fold=fold) for fold in (True, False))
    torch.testing.assert_close(folded, projected)


def test_names_and_initialisation_are_the_published_ones():
    evl, uniformer = nn.EVLDecoderLayer(CHANNELS, HEADS), nn.UniFormerV2Extractor(CHANNELS, HEADS)
    linear = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2", "norm3")
    assert set(evl.state_dict()) == {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    others = ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2", "ln_3")
    names = {f"{name}.{kind}" for name in others for kind in ("weight", "bias")}
    assert set(uniformer.state_dict()) == names | {"attn.in_proj_weight", "attn.in_proj_bias"}
    assert not evl.attn.k_proj.bias.any() and 0 < evl.mlp.fc1.bias.abs().max() < 1e-5
    assert evl.attn.q_proj.weight.abs().max() <= (6 / (2 * CHANNELS)) ** 0.5
    x, features = inputs(1, 4, False, torch.float32)
    assert torch.equal(uniformer(x, features), x)


@pytest.mark.parametrize("kind, name", [("EVL", "attn.k_proj"), ("EVL", "norm3"), ("UniFormerV2", "ln_3")])
def test_children_that_are_more_than_their_class_are_called(kind, name):
    layer = made(kind)
    x, features = inputs(1, 4, False)
    want = layer(x, features)
    called = []
    layer.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    torch.testing.assert_close(layer(x, features), want)
    assert called == [name]
    mask = torch.tensor([[True, False, True, True]] * 2)
    torch.testing.assert_close(layer(x, features, mask)[:1], layer(x[:1], features[:1, [0, 2, 3]]))


def test_every_parameter_has_a_gradient():
    """Also the keys' bias, which shifts all scores of a query alike: exactly zero, but not None."""
    layer = made("EVL")
    layer(*inputs(1, 4, False)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters()) and not layer.attn.k_proj.bias.grad.any()


def test_features_are_kept_once():
    """From forward to backward: the normalised features; published are these, keys and values, and what the softmax is of."""
    from bench.memory import kept_for_backward
    from i2v_kernels.testing import Sample

    layer, features = made("EVL"), torch.randn(2, 8, 400, CHANNELS, dtype=torch.float64)
    sample = Sample("", (torch.randn(2, 1, CHANNELS, dtype=torch.float64, requires_grad=True),))
    kept = kept_for_backward(lambda x: layer(x, features), sample)
    assert kept < 1.2 * features.numel() * 8 / 2**20 < kept_for_backward(lambda x: published(layer, x, features), sample) / 2


BAD = [
    (lambda: nn.EVLDecoderLayer(0, 1), ValueError, "EVLDecoderLayer: channels=0"),
    (lambda: nn.EVLDecoderLayer(8, 3), ValueError, "EVLDecoderLayer: heads=3 must divide 8"),
    (lambda: nn.EVLDecoderLayer(8, 2, mlp_factor="4"), TypeError, "mlp_factor='4'"),
    (lambda: nn.UniFormerV2Extractor(8, 2, mlp_factor=0), ValueError, "mlp_factor=0"),
    (lambda: nn.UniFormerV2Extractor(8, 2, dropout=2), ValueError, "dropout=2"),
    (lambda: nn.EVLDecoderLayer(8, 2)(torch.zeros(2, 8), torch.zeros(2, 3, 4, 8)), ValueError, "x.shape=(2, 8)"),
    (lambda: nn.EVLDecoderLayer(8, 2)(torch.zeros(2, 1, 8), torch.zeros(2, 12, 8)), ValueError, "features.shape=(2, 12, 8)"),
    (lambda: nn.EVLDecoderLayer(8, 2)(torch.zeros(2, 1, 8), torch.zeros(1, 3, 4, 8)), ValueError, "[2, T, N, 8] is needed"),
]


@pytest.mark.parametrize("call, exception, text", BAD)
def test_bad_input(call, exception, text):
    with pytest.raises(exception) as raised:
        call()
    assert text in str(raised.value)


def test_docstring_examples():
    result = doctest.testmod(importlib.import_module("i2v_kernels.nn.decoder_layer"))
    assert result.attempted > 0 and result.failed == 0
