"""Random calls of every op in the registry, by every backend that runs here, against the definition in float64.

Each call: shapes with 0 and 1 among them, all options, strides of inputs and gradients, at times a number that is not finite;
forward, backward and tangents, on memory that holds NaN until it is written. 300 calls, the same ones in every run;
``I2V_KERNELS_FUZZ=10000 python -m pytest tests/ops/test_fuzz.py`` draws that many others.
"""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_layouts import backends
from test_special_values import judge, spoiled
from torch.func import jvp

from i2v_kernels.testing import OPINFOS
from i2v_kernels.testing.layouts import LAYOUTS, relaid

COUNT = os.environ.get("I2V_KERNELS_FUZZ", "")
EXAMPLES = -(-int(COUNT or 300) // len(OPINFOS))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PLACES = (None, *LAYOUTS)
AMX = torch.cpu._is_amx_tile_supported()
JUNK = (object(), "yes", b"", 1.5, -1, 2**63, -(2**70), 10**400, (2,), (1, 2, 3, 4), [], {}, float("nan"), True, torch.ones(2))
fuzz = settings(
    max_examples=EXAMPLES, derandomize=not COUNT, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip


def run(info, sample, grad, backend):
    leaves = sample.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))
    out = info.op(*leaves.args, **leaves.kwargs, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves.tensors(), grad)]


def dense(x):
    return (x.double() if x.is_floating_point() else x).contiguous()


@pytest.mark.parametrize("info", OPINFOS, ids=str)
@fuzz
@given(data=st.data())
def test_call(info, data):
    def choose(options):
        return data.draw(st.sampled_from(options))

    dtype = choose(DTYPES)

    def place(x):
        x = x.to(dtype) if x.is_floating_point() else x
        layout = choose(PLACES) if x.dtype != torch.bool else None
        return x if layout is None else relaid(x, layout)

    call = info.drawn(choose).map(place)
    with torch.no_grad():
        out = info.op(*call.args, **call.kwargs, backend="reference")
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    layout = choose(PLACES)
    grad = grad if layout is None else relaid(grad, layout)
    special = choose((None, None, None, float("nan"), float("inf")))
    if special is not None and all(x.numel() > 0 for x in call.inputs()):
        tensors = call.tensors()
        which = choose(range(info.spreads, len(tensors) + (not info.spreads)))  # one of the tensors, or the gradient
        target = tensors[which] if which < len(tensors) else None
        call = call.map(lambda x: spoiled(x.contiguous(), special, 3) if x is target else x)
        grad = spoiled(grad.contiguous(), special, 3) if target is None else grad
        event("not finite")
    else:
        special = None
    exact_call = call.map(dense)
    want = run(info, exact_call, dense(grad), "reference")
    eager = run(info, call, grad, "reference")
    largest = max([1.0, *(x[x.isfinite()].abs().max().item() for x in want if x.isfinite().any())])
    eps = torch.finfo(dtype).eps
    for backend in backends(info):
        if backend == "sdpa" and call.args[0].numel() == 0:
            continue
        got = run(info, call, grad, backend)
        known = [torch.where(e.isfinite() | ~w.isfinite(), g, w.to(g.dtype)) for g, e, w in zip(got, eager, want)]
        if dtype in (torch.float32, torch.float64) and not (backend == "reference" and special is not None):
            judge(info, known, want, (backend,))
        if special is not None and info.pads:  # what the activation makes of those NaN is the definition's alone
            continue
        for i, (g, e, w) in enumerate(zip(known, eager, want, strict=True)):
            kind = torch.promote_types(dtype, torch.float32) if info.wide and i == 0 else dtype
            assert g.shape == w.shape and g.dtype == kind, (backend, i)
            finite = w.isfinite() & e.isfinite()
            if AMX and backend == "sdpa" and special is not None and dtype == torch.bfloat16:
                finite &= g.isfinite()  # PyTorch's bfloat16 products carry a NaN into the products beside
            found, yard = ((x.double() - w)[finite].norm().item() for x in (g, e))
            limit = 4 * yard + 32 * eps * (w[finite].norm().item() + w.numel() ** 0.5 * largest)
            assert found <= limit, (backend, i, found, limit)
    if special is None and dtype in (torch.float32, torch.float64):
        tangents(info, exact_call, dense(grad), want[1:])


def tangents(info, call, grad, grads):
    """The tangent of the output along ``grad`` is that of the gradients along the inputs' tangents."""
    inputs = call.tensors()
    along = [torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(7 + i)) for i, x in enumerate(inputs)]

    def function(*given):
        others = {id(x): y for x, y in zip(inputs, given)}
        placed = call.map(lambda x: others.get(id(x), x))
        return info.op(*placed.args, **placed.kwargs)

    try:
        _, tangent = jvp(function, tuple(inputs), tuple(along))
    except NotImplementedError:
        event("no tangent")
        return
    left = (tangent * grad).sum()
    terms = torch.stack([(g * a).sum() for g, a in zip(grads, along)])
    scale = (tangent * grad).abs().sum() + terms.abs().sum()
    assert (left - terms.sum()).abs() <= 1e-9 * (1 + scale), (left, terms)


@pytest.mark.parametrize("info", OPINFOS, ids=str)
@fuzz
@given(data=st.data())
def test_junk_for_an_option(info, data):
    """Anything for any option: taken, or refused in one sentence that names it."""
    sample = info.samples()[0].to(torch.float32)
    names = [p.name for p in inspect.signature(info.op).parameters.values() if p.kind is p.KEYWORD_ONLY]
    name, value = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(JUNK))
    try:
        info.op(*sample.args, **{**sample.kwargs, name: value})
    except (TypeError, ValueError, NotImplementedError) as error:
        assert str(error).startswith(f"{info.name}: ") and name in str(error)
