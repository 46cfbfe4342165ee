"""X-Pool's layer: what is linear is folded into the frames, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import trained
from published import XPool
from torch import Tensor, nn
from twins import results, twins

import i2v_kernels as i2v


def made(texts: int = 20) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return trained(XPool(32)), (torch.randn(texts, 32), torch.randn(3, 5, 32))


@pytest.mark.parametrize("texts", [1, 5, 6, 20])
@pytest.mark.parametrize("training", [False, True])
def test_results_and_gradients(texts: int, training: bool) -> None:
    """With dropout in training, of the same numbers; few texts are left to the class."""
    model, inputs = made(texts)
    fast, plain = twins(model.train(training))
    for got, want in zip(results(fast, inputs), results(plain, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_no_pair_meets_a_matrix() -> None:
    """Products of 60 pairs with a matrix of 32 by 32: the class's own has two."""
    module, inputs = made()
    fast, plain = (each.eval() for each in twins(module))
    counts = []
    for each in (fast, plain):
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profiled:
            each(*inputs)
        shapes = [e.input_shapes for e in profiled.events() if e.name in ("aten::addmm", "aten::mm", "aten::bmm")]
        counts.append(sum([60, 32] in shape and [32, 32] in shape for shape in shapes))
    assert counts == [0, 2]


def test_autocast() -> None:
    model, inputs = made()
    fast, plain = (each.eval() for each in twins(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fast(*inputs), plain(*inputs)
    exact = copy.deepcopy(plain).double()(*(x.double() for x in inputs))
    assert got.dtype == want.dtype
    assert (got - exact).norm() < 1.5 * (want - exact).norm()


def test_forks_and_several_heads_are_refused() -> None:
    module, _ = made()

    class Added(XPool):
        def forward(self, text_embeds: Tensor, video_embeds: Tensor) -> Tensor:
            return super().forward(text_embeds, video_embeds) + text_embeds

    module.__class__ = Added
    assert "other outputs" in i2v.patch(module).rows[0].detail
    assert "several heads" in i2v.patch(XPool(32, 2)).rows[0].detail
    module, _ = made()
    module.layer_norm2 = nn.LayerNorm(32, bias=False)
    assert "no biases" in i2v.patch(module).rows[0].detail


@pytest.mark.parametrize("path", ["linear_proj", "cross_attn.out_proj", "layer_norm2", "dropout", "cross_attn"])
def test_a_hook_on_what_is_passed_over_is_called(path: str) -> None:
    module, inputs = made()
    plain = copy.deepcopy(module.eval())
    assert i2v.patch(module).rows[0].replaced
    for each in (module, plain):
        each.get_submodule(path).register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(module(*inputs), plain(*inputs))
    assert not i2v.patch(plain).rows[0].replaced
