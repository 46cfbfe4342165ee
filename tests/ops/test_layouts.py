"""Inputs and gradients wherever they lie: expanded, overlapping, permuted, sliced. Memory that was never written is NaN."""

from __future__ import annotations

import pytest
import torch
from test_pytorch import schema_args
from torch._subclasses.fake_tensor import FakeTensorMode

from i2v_kernels import _extension
from i2v_kernels.ops import base
from i2v_kernels.testing import OPINFOS
from i2v_kernels.testing.layouts import LAYOUTS, relaid, relaid_sample

ODD = [pytest.param(info, layout, id=f"{info}-{layout}") for info in OPINFOS for layout in LAYOUTS]


def some(info, layout, share):
    """The first sample and, of the others, those whose turn it is in this layout."""
    first, *others = info.samples()
    return [first, *others[list(LAYOUTS).index(layout) % share :: share]]


def backends(info):
    """Those that can run on a CPU outside Triton's interpreter."""
    names = ["reference", "sdpa", "library", *(["cpu"] if _extension.why_no_cpu() is None else [])]
    return [b.name for b in base.OPS[info.name].backends if b.name in names]


def compact(sample):
    """The same values, contiguous, in float64."""
    return sample.map(lambda x: x.contiguous()).to(torch.float64, requires_grad=True)


def run(info, sample, backend, layout=None):
    """Output and gradients, for a gradient in that layout."""
    out = info.op(*sample.args, **sample.kwargs, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    # a layout may repeat what it expands: the values that the kernel gets, wherever they lie
    grad = relaid(grad, layout).contiguous() if sample.dtype == torch.float64 else relaid(grad.to(out), layout)
    return [out, *torch.autograd.grad(out, sample.tensors(), grad)]


@pytest.mark.parametrize("info, layout", ODD)
def test_any_layout(info, layout):
    for sample in some(info, layout, 16):
        if not all(t.isfinite().all() for t in sample.tensors()):
            continue
        odd = relaid_sample(sample, layout)
        want = run(info, compact(odd), "reference", layout)
        for backend in backends(info):
            got = run(info, odd.to(torch.float32, requires_grad=True), backend, layout)
            for i, (g, w) in enumerate(zip(got, want, strict=True)):
                assert g.shape == w.shape
                if i and info.picks and "expanded" in layout:
                    continue  # tokens that are the same one: which of them is picked is a matter of rounding
                bound = 1e-5 * (w.norm() + w.numel() ** 0.5)
                assert (g.double() - w).norm() <= bound, (sample.name, backend, i, (g.double() - w).norm(), bound)


@pytest.mark.parametrize("info, layout", ODD)
def test_one_rule_for_outputs_and_gradients(info, layout, monkeypatch):
    """Every backend gives shapes, dtypes and strides that the fake implementations promise to torch.compile."""
    op, seen = base.OPS[info.name], []
    derive = op.derive

    def watched(*args):
        seen.append((op.backward_op, args, derive(*args)))
        return seen[-1][2]

    monkeypatch.setattr(op, "derive", watched)
    for sample in some(info, layout, 20):
        odd = relaid_sample(sample, layout).to(torch.float32, requires_grad=True)
        *call, _ = schema_args(info, odd)
        call = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
        for backend in backends(info):
            if op.why_not(backend, call) is not None:
                continue
            seen[:] = [(op.forward_op, (*call, backend), op.forward_op(*call, backend))]
            run(info, odd, backend, layout)
            assert len(seen) == 2
            for which, args, real in seen:
                given = [x.detach() if isinstance(x, torch.Tensor) else x for x in args[:-1]]
                with FakeTensorMode() as mode:
                    fake = which(*[mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given], "")
                parts = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True)
                for i, (a, b) in enumerate(parts):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype), (sample.name, backend, which, i)
                    # where there is one step at most, its length means nothing
                    steps = [(s, t) for size, s, t in zip(a.shape, a.stride(), b.stride()) if size > 1 and a.numel() > 0]
                    assert all(s == t for s, t in steps), (sample.name, backend, which, i)
