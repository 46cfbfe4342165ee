"""What is particular to bottleneck_adapter: parts that are frozen, what it keeps for backward, the published modules."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_correct import compare

import i2v_kernels.nn as i2v_nn
from i2v_kernels.ops import products
from i2v_kernels.testing import OPINFOS

INFO = next(info for info in OPINFOS if info.name == "bottleneck_adapter")
NORMED = next(sample for sample in INFO.samples() if sample.name == "norm")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_only_what_is_wanted_has_a_gradient(backend):
    """Any of the seven alone and any pair, to the numbers that come of all seven together."""
    sample = NORMED.to(requires_grad=True)
    tensors, grad = sample.tensors(), torch.randn(sample.args[0].shape, dtype=torch.float64)
    every = torch.autograd.grad(INFO.op(*sample.args, **sample.kwargs, backend=backend), tensors, grad)
    for wanted in (*itertools.combinations(range(7), 1), *itertools.combinations(range(7), 2)):
        *args, weight, bias = (x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors))
        out = INFO.op(*args, norm=(weight, bias, 1e-5), backend=backend)
        got = torch.autograd.grad(out, [(*args, weight, bias)[i] for i in wanted], grad)
        for i, g in zip(wanted, got):
            torch.testing.assert_close(g, every[i])


@pytest.mark.parametrize("size", [7 * 10 * 4, 16 * 10 * 4, 1 << 30])
@pytest.mark.parametrize("name", ["norm", "quick_gelu", "sequence first", "every other frame", "rows"])
def test_any_cut_into_blocks(name, size, monkeypatch):
    monkeypatch.setitem(products.BLOCK, "cpu", size)
    compare(INFO, next(sample for sample in INFO.samples() if sample.name == name), torch.float32, "cpu")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gelu", "norm", "relu"])
def test_keeps_the_bottleneck_or_nothing(name, recompute):
    sample = next(sample for sample in INFO.samples() if sample.name == name).to(torch.float32, requires_grad=True)
    known = {t.data_ptr() for t in sample.tensors()}
    kept = []

    def keep(t):
        if t.data_ptr() not in known and t.numel() > 0:
            kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        INFO.op(*sample.args, **{**sample.kwargs, "recompute": recompute})
    assert kept == ([] if recompute else [(2, 4, 5, 10)])


def test_is_the_published_adapter_of_aim():
    """Yang et al., 2302.03024: ``D_fc2(gelu(D_fc1(x)))``, plus x if ``skip_connect``."""
    x = torch.randn(2, 4, 5, 24, dtype=torch.float64)
    for residual in (True, False):
        adapter = i2v_nn.BottleneckAdapter(24, 6, residual=residual).double()
        assert torch.equal(adapter(x), x if residual else torch.zeros_like(x))
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        update = adapter.D_fc2(F.gelu(adapter.D_fc1(x)))
        torch.testing.assert_close(adapter(x), x + update if residual else update)


def test_is_the_published_adapter_of_adaptformer():
    """Chen et al., 2205.13535: ``scale * up_proj(relu(down_proj(norm(x))))``, layer norm "in"."""
    x, norm = torch.randn(3, 5, 24, dtype=torch.float64), torch.nn.LayerNorm(24).double()
    adapter = i2v_nn.BottleneckAdapter(24, 8, "relu", 0.1, residual=False, published="adaptformer").double()
    for parameter in (*adapter.parameters(), *norm.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    want = 0.1 * adapter.up_proj(F.relu(adapter.down_proj(norm(x))))
    torch.testing.assert_close(adapter(norm(x)), want)
    parts = [p for linear in (adapter.down_proj, adapter.up_proj) for p in (linear.weight, linear.bias)]
    options = {"activation": "relu", "scale": 0.1, "residual": False, "norm": (norm.weight, norm.bias, norm.eps)}
    torch.testing.assert_close(INFO.op(x, *parts, **options), want)
    with pytest.raises(ValueError, match="published='houlsby' is not one of 'aim', 'adaptformer'"):
        i2v_nn.BottleneckAdapter(24, 8, published="houlsby")
