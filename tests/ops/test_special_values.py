"""NaN and infinity get where the definition says and nowhere else: not past a mask, forward or backward, in any backend."""

from __future__ import annotations

import pytest
import torch
from test_layouts import backends

import i2v_kernels as i2v
from i2v_kernels.testing import OPINFOS

SPECIAL = [pytest.param(info, value, id=f"{info}-{value}") for info in OPINFOS for value in (float("nan"), float("inf"))]


def spoiled(x, value, seed):
    """With one number, somewhere, that is not finite."""
    x = x.detach().clone()
    if x.numel() > 0:
        place = torch.randint(x.numel(), (1,), generator=torch.Generator().manual_seed(seed + x.numel()))
        x.view(-1)[place] = value
    return x


def results(info, sample, grad, backend):
    out = info.op(*sample.args, **sample.kwargs, backend=backend)
    return [out, *torch.autograd.grad(out, sample.tensors(), grad.to(out))]


def judge(info, got, want, what):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        new = ~g.isfinite() & w.isfinite()
        lost = g.isfinite() & ~w.isfinite()
        assert not new.any(), (*what, i, "came", new.nonzero()[:3])
        assert not lost.any() or info.pads, (*what, i, "was lost", lost.nonzero()[:3])


@pytest.mark.parametrize("info, value", SPECIAL)
def test_one_number_that_is_not_finite(info, value):
    for turn, sample in enumerate(info.samples()[::3] if value == value else info.samples()[::2]):
        sample = sample.map(lambda x: x.contiguous()).to()
        if sample.dtype != torch.float64 or not all(t.isfinite().all() for t in sample.tensors()):
            continue
        if any(x.numel() == 0 for x in sample.inputs()):  # nothing is multiplied there, by NaN neither
            continue
        count = len(sample.tensors())
        which = turn % (count + 1)  # one of the tensors, or the gradient
        target = sample.tensors()[which] if which < count else None
        sample = sample.map(lambda x, target=target, turn=turn: spoiled(x, value, turn) if x is target else x)
        sample = sample.to(torch.float64, requires_grad=True)
        grad = torch.randn_like(info.op(*sample.args, **sample.kwargs, backend="reference"))
        grad = spoiled(grad, value, turn) if target is None else grad
        if info.spreads and (target is None or which == 0):
            continue
        want = results(info, sample, grad, "reference")
        low = sample.to(torch.float32, requires_grad=True)
        for backend in backends(info):
            if backend != "reference":  # PyTorch's own products lose infinities among NaN
                judge(info, results(info, low, grad, backend), want, (sample.name, which, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [[0, 1, 9], [-2, 0, 1], None], ids=str)
@pytest.mark.parametrize("options", ["causal", "window", "mask"])
def test_nothing_past_a_mask(options, offsets, dtype):
    """A NaN in q of frame 3 used to reach the gradients of keys that this frame may not see."""
    info = next(info for info in OPINFOS if info.name == "temporal_attention")
    options = {"causal": {"causal": True}, "window": {"window": (1, 2)}, "mask": {"mask": torch.rand(2, 7) > 0.4}}[options]
    for which in range(4):
        tensors = [torch.randn(2, 7, 2, 3, 16).to(dtype) for _ in range(4)]
        tensors[which][0, 3, 1, :, 3] = float("nan")
        *qkv, grad = tensors

        def call(backend, dtype, qkv=qkv, grad=grad):
            leaves = [x.to(dtype).requires_grad_() for x in qkv]
            out = i2v.temporal_attention(*leaves, offsets=offsets, backend=backend, **options)
            return [out, *torch.autograd.grad(out, leaves, grad.to(out))]

        want = call("reference", torch.float64)
        for backend in backends(info)[1:]:
            judge(info, call(backend, dtype), want, (which, backend))
