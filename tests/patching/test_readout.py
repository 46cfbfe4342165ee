"""Layers whose few queries read a clip: keys and values are folded away, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import trained
from published import EVLDecoderLayer, Extractor
from torch import Tensor, nn
from twins import results, twins

import i2v_kernels as i2v


def made(name: str, dropout: float = 0.0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    if name == "evl":
        layer = trained(EVLDecoderLayer(48, 3))
        layer.mlp[2].p = dropout
        return layer, (torch.randn(2, 1, 48), torch.randn(2, 20, 48))
    return trained(Extractor(48, 3, dropout, dropout)), (torch.randn(1, 2, 48), torch.randn(20, 2, 48))


BOTH = pytest.mark.parametrize("name", ["evl", "uniformerv2"])


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_results_and_gradients(name: str, training: bool) -> None:
    """In training with dropout too: the layers that drop are called."""
    model, inputs = made(name, dropout=0.3)
    fast, plain = twins(model.train(training))
    found = []
    for module in (fast, plain):
        torch.manual_seed(2)
        found.append(results(module, inputs))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@BOTH
def test_no_key_or_value_is_projected(name: str) -> None:
    """Products of 40 tokens with a matrix of 48 by 48: the class's own has two."""
    module, inputs = made(name)
    fast, plain = (each.eval() for each in twins(module))
    counts = []
    for each in (fast, plain):
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profiled:
            each(*inputs)
        shapes = [e.input_shapes for e in profiled.events() if e.name in ("aten::addmm", "aten::mm", "aten::bmm")]
        counts.append(sum([40, 48] in shape and [48, 48] in shape for shape in shapes))
    assert counts == [0, 2]


@BOTH
def test_many_queries_are_left_to_the_class(name: str) -> None:
    """From a quarter of the channels on, queries times heads."""
    model, (x, y) = made(name)
    fast, plain = twins(model)
    dim = 1 if name == "evl" else 0
    for count in (4, 5, 30):
        q = torch.randn_like(x.repeat_interleave(count, dim))
        torch.testing.assert_close(fast(q, y), plain(q, y), rtol=1e-4, atol=1e-5)


@BOTH
def test_forks_are_refused(name: str) -> None:
    module, _ = made(name)

    class Masked(type(module)):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y[:, :3] if name == "evl" else y[:3])

    module.__class__ = Masked
    assert "other outputs" in i2v.patch(module).rows[0].detail


def test_lora_on_a_projection_that_is_passed_over() -> None:
    """It takes effect, before and after patching."""
    for before in (False, True):
        module, inputs = made("evl")
        plain = copy.deepcopy(module)
        if not before:
            assert i2v.patch(module).rows[0].replaced
        for each in (module, plain):
            linear = each.attn.v_proj
            linear.forward = lambda x, linear=linear: 2 * type(linear).forward(linear, x)
        if before:
            assert not i2v.patch(module).rows[0].replaced
        torch.testing.assert_close(module(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)
