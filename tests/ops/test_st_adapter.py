"""What is particular to st_adapter: parts that are frozen, what it keeps for backward, how it cuts the clips into blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_correct import compare, needs_extension

from i2v_kernels.ops import products
from i2v_kernels.testing import OPINFOS, Sample

INFO = next(info for info in OPINFOS if info.name == "st_adapter")


@needs_extension
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_only_what_is_wanted_has_a_gradient(backend):
    """Any of the seven alone and any pair, to the numbers that come of all seven together."""
    sample = INFO.samples()[1].to(requires_grad=True)
    tensors, grad = sample.tensors(), torch.randn(sample.args[0].shape, dtype=torch.float64)
    out = INFO.op(*sample.args, **sample.kwargs, backend=backend)
    every = torch.autograd.grad(out, tensors, grad)
    for wanted in (*itertools.combinations(range(7), 1), *itertools.combinations(range(7), 2)):
        args = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        got = torch.autograd.grad(INFO.op(*args, **sample.kwargs, backend=backend), [args[i] for i in wanted], grad)
        for i, g in zip(wanted, got):
            torch.testing.assert_close(g, every[i])


@needs_extension
@pytest.mark.parametrize("layout", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("size", [1, 4 * 13 * 12 * 4, 2 * 4 * 13 * 12 * 4, 1 << 30])
def test_any_cut_into_blocks(size, layout, monkeypatch):
    """One clip at a time, one whose last block is shorter, and all at once."""
    monkeypatch.setitem(products.BLOCK, "cpu", size)
    first = INFO.samples()[0]
    x = torch.randn([(3, 4, 13)[i] for i in layout] + [20], dtype=torch.float64)
    x = x.permute(*(layout.index(i) for i in range(3)), 3)
    compare(INFO, Sample("", (x, *first.args[1:])), torch.float32, "cpu")
    compare(INFO, Sample("", (x[:, :, :, :15], first.args[1][:, :15], *first.args[2:5], *(t[:15] for t in first.args[5:]))),
            torch.float32, "cpu")  # fmt: skip


@needs_extension
def test_keeps_the_bottleneck_and_nothing_else():
    sample = INFO.samples()[0].to(torch.float32, requires_grad=True)
    known = {t.data_ptr() for t in sample.tensors()}
    kept = []

    def keep(t):
        if t.data_ptr() not in known:
            kept.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        INFO.op(*sample.args, **sample.kwargs)
    assert kept == [(3, 4, 13, 12)]


@needs_extension
def test_backward_of_a_call_that_kept_nothing():
    """As torch.ops may call it: the bottleneck is then computed again."""
    sample = INFO.samples()[0].to(requires_grad=True)
    want = torch.autograd.grad(INFO.op(*sample.args).sum(), sample.tensors())
    out, kept = torch.ops.i2v_kernels.st_adapter(*sample.args, 1, 12, 1, False, "cpu")
    assert kept.numel() == 0
    for got, w in zip(torch.autograd.grad(out.sum(), sample.tensors()), want):
        torch.testing.assert_close(got, w)
