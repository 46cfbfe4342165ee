"""Derivatives beyond ``backward()``: tangents, gradients of gradients, ``torch.func``. Right, or refused in a sentence; never
a 0 that is none.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import i2v_kernels as i2v
from i2v_kernels import nn as i2v_nn
from i2v_kernels.ops import base
from i2v_kernels.testing import OPINFOS
from tests.ops.test_correct import needs_extension

FOLLOWED = ("reference", "library", "sdpa")  # backends that PyTorch can differentiate in every way
CALLS = [pytest.param(info, sample, id=f"{info}-{sample.name}") for info in OPINFOS for sample in info.samples()[:2]]
FIRST = [pytest.param(info, info.samples()[0], id=str(info)) for info in OPINFOS]
BACKENDS = [
    pytest.param(info, name, id=f"{info}-{name}")
    for info in OPINFOS
    for name in (None, *(backend.name for backend in base.OPS[info.name].backends if backend.name in FOLLOWED))
]
KERNELS = [
    pytest.param(info, backend.name, id=f"{info}-{backend.name}", marks=needs_extension)
    for info in OPINFOS
    for backend in base.OPS[info.name].backends
    if backend.name == "cpu"
]


def function(info, sample, backend=None):
    """The op as a function of the sample's floating-point tensors, and these in float64."""

    def place(value, tensors):
        if isinstance(value, tuple):
            return tuple(place(part, tensors) for part in value)
        return next(tensors) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def call(*tensors):
        given = iter(tensors)
        args = [place(value, given) for value in sample.args]
        return info.op(*args, **{key: place(value, given) for key, value in sample.kwargs.items()}, backend=backend)

    sample = sample.to(torch.float64)
    return call, [t.detach() for t in sample.tensors()]


def with_grad(tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("info, sample", FIRST)
def test_against_finite_differences(info, sample):
    """Tangents, gradients, gradients of gradients and tangents of gradients."""
    call, tensors = function(info, sample)
    options = {"atol": 1e-6, "fast_mode": True}
    assert torch.autograd.gradcheck(call, with_grad(tensors), check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(call, with_grad(tensors), check_fwd_over_rev=True, **options)


@pytest.mark.parametrize("info, backend", BACKENDS)
def test_a_gradient_of_a_gradient_that_needs_none(info, backend):
    """The incoming gradient is a constant: what comes back depends on the inputs all the same."""
    call, tensors = function(info, info.samples()[0], backend)
    weight = torch.randn_like(call(*tensors))
    along = [torch.randn_like(t) for t in tensors]

    def gradients(leaves, create_graph=False):
        return torch.autograd.grad((call(*leaves) * weight).sum(), leaves, create_graph=create_graph)

    leaves = with_grad(tensors)
    got = sum((g * a).sum() for g, a in zip(gradients(leaves, create_graph=True), along))
    step = 1e-5
    ahead, behind = ([t + sign * step * a for t, a in zip(tensors, along)] for sign in (1, -1))
    pairs = zip(gradients(with_grad(ahead)), gradients(with_grad(behind)))
    want = [(a - b) / (2 * step) for a, b in pairs]
    if not got.requires_grad:  # linear in all of its inputs together
        assert not any(w.abs().max() > 1e-8 for w in want)
        return
    second = torch.autograd.grad(got, leaves, allow_unused=True, materialize_grads=True)
    for g, w in zip(second, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("info, backend", BACKENDS)
def test_transforms(info, backend):
    call, tensors = function(info, info.samples()[0], backend)
    reference, _ = function(info, info.samples()[0], "reference")
    along = tuple(torch.randn_like(t) for t in tensors)
    leaves = with_grad(tensors)
    out = reference(*leaves)
    incoming = torch.randn_like(out)
    want = torch.autograd.grad(out, leaves, incoming)

    def close(got):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)

    value, pull = vjp(call, *tensors)
    torch.testing.assert_close(value, out.detach())
    assert value.stride() == out.stride()
    close(pull(incoming))
    used = with_grad(tensors)
    batched = torch.autograd.grad(call(*used), used, torch.stack([incoming, -incoming]), is_grads_batched=True)
    close([both[0] for both in batched])
    close([-both[1] for both in batched])
    close(grad(lambda *t: (call(*t) * incoming).sum(), argnums=tuple(range(len(tensors))))(*tensors))
    value, tangent = jvp(call, tuple(tensors), along)
    assert value.stride() == out.stride()
    torch.testing.assert_close((tangent * incoming).sum(), sum((w * a).sum() for w, a in zip(want, along)))
    with forward_ad.dual_level(), torch.no_grad():  # which ends no tangents
        dual = call(*map(forward_ad.make_dual, tensors, along))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, tangent)


@pytest.mark.parametrize("info, sample", CALLS)
def test_vmap(info, sample):
    """Batches in front, behind, of some arguments alone; and of gradients: one for each sample."""
    call, tensors = function(info, sample)
    many = [torch.stack([t, t.flip(0), 0.5 * t]) for t in tensors]

    def loss(*t):
        return call(*t).square().sum()

    def each(f, used):
        return [f(*(m[i] if use else t for m, t, use in zip(many, tensors, used))) for i in range(3)]

    first = [True] + [False] * (len(tensors) - 1)
    for used in (first, [not use for use in first], [True] * len(tensors)):
        if not any(used):
            continue
        for dim in (0, -1):
            given = [m.movedim(0, dim) if use else t for m, t, use in zip(many, tensors, used)]
            dims = tuple(dim if use else None for use in used)
            got = vmap(call, in_dims=dims, randomness="different")(*given)
            torch.testing.assert_close(got, torch.stack(each(call, used)))
    argnums = tuple(range(len(tensors)))
    got = vmap(grad(loss, argnums=argnums))(*many)
    for i in range(3):
        leaves = with_grad([m[i] for m in many])
        for g, w in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(g[i], w)


@pytest.mark.parametrize("info, name", KERNELS)
def test_kernels_asked_for_by_name_refuse(info, name):
    call, tensors = function(info, info.samples()[0], name)
    text = rf"{info.name}: backend='{name}' has no rule for .*; use backend=\"reference\""
    with pytest.raises(NotImplementedError, match=text):
        jvp(call, tuple(tensors), tuple(tensors))
    with pytest.raises(NotImplementedError, match=text):
        grad(lambda *t: call(*t).sum())(*tensors)
    with pytest.raises(NotImplementedError, match=text):
        vmap(call)(*(t[None] for t in tensors))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match=text):
        call(*map(forward_ad.make_dual, tensors, tensors))


@pytest.mark.parametrize("info, sample", FIRST)
def test_hessians_of_both_kinds(info, sample):
    """Of the last, smallest argument."""
    call, tensors = function(info, sample)
    *others, last = tensors
    last, rest = (last.flatten()[:3], last.flatten()[3:])

    def loss(head):
        return call(*others, torch.cat([head, rest]).view(tensors[-1].shape)).sin().sum()

    want = torch.autograd.functional.hessian(loss, last)
    step = 1e-5
    for i, direction in enumerate(torch.eye(3, dtype=torch.float64)):
        ahead, behind = (torch.autograd.functional.jacobian(loss, last + sign * step * direction) for sign in (1, -1))
        torch.testing.assert_close(want[i], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hessian(loss)(last), want)
    torch.testing.assert_close(jacrev(jacfwd(loss))(last), want)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, last, vectorize=True), want)


@pytest.mark.parametrize("info, sample", FIRST)
def test_compiled(info, sample):
    torch._dynamo.reset()
    call, tensors = function(info, sample)

    def step(*t):
        return vmap(grad(lambda *t: call(*t).sin().sum()))(*(x[None] for x in t)), jvp(call, t, t)[1]

    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(got, step(*tensors))


@pytest.mark.parametrize("info, sample", FIRST)
def test_explain_says_what_transforms_run(info, sample):
    call, tensors = function(info, sample)
    found = []

    def explained(*t):
        found.append(i2v.explain(lambda_of(info), *t))
        return call(*t)

    def lambda_of(info):
        def op(*t):
            return call(*t)

        op.__name__ = info.name
        return op

    jvp(explained, tuple(tensors), tuple(tensors))
    assert found[0].backend == "reference" and "differentiated in every way" in found[0].reasons["reference"]


def test_in_place_with_tangents_and_batches():
    x, along = torch.randn(2, 2, 4, 3, 6, dtype=torch.float64)
    shift = {"groups": [(2, 1), (2, -1)], "padding": "edge"}
    want = i2v.token_shift(along, **shift)
    assert torch.equal(jvp(lambda x: i2v.token_shift_(x.clone(), **shift), (x,), (along,))[1], want)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), along)
        i2v.token_shift_(dual, **shift)
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, want)
    many = torch.stack([x, along], dim=2)
    got = vmap(lambda x: i2v.token_shift_(x, **shift), in_dims=2, out_dims=2)(many)
    assert got.data_ptr() == many.data_ptr() and torch.equal(got[:, :, 1], want)
    with pytest.raises(ValueError, match=r"x.requires_grad=True.*use token_shift"):
        grad(lambda x: i2v.token_shift_(x, **shift).sum())(x)
    with pytest.raises(NotImplementedError, match=r"token_shift_: backend='cpu' has no rule"):
        vmap(lambda x: i2v.token_shift_(x, **shift, backend="cpu"))(many)


@pytest.mark.parametrize("info, sample", FIRST)
def test_forward_mode_in_another_thread_changes_nothing(info, sample):
    """Its level counts for all threads; here nothing is a dual number."""
    call, tensors = function(info, sample)

    def step(done):
        leaves = with_grad(tensors)
        out = call(*leaves)
        grads = torch.autograd.grad(out.sin().sum(), leaves)
        with torch.no_grad():
            done.append([out, call(*leaves), *grads])

    want, got = [], []
    step(want)
    with forward_ad.dual_level():
        thread = threading.Thread(target=step, args=(got,))
        thread.start()
        thread.join()
    assert all(torch.equal(g, w) for g, w in zip(got[0], want[0], strict=True))


def test_a_zero_that_has_no_memory():
    """Derivatives may hold such tensors; a kernel that reads memory would end the process."""
    x, weight = torch._efficientzerotensor((1, 2, 3, 4)), torch.randn(4, 4, requires_grad=True)
    assert x._is_zerotensor() and not base.OPS["lora_linear"]._direct((x, weight))
    assert not i2v.token_shift(x, [(4, 1)]).any()
    out = i2v.lora_linear(x, weight, weight, weight)
    assert not out.any() and not torch.autograd.grad(out, weight, torch._efficientzerotensor(out.shape))[0].any()


def test_backward_ops_by_themselves_say_that_they_end_here():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="token_shift_backward: the registered op has no derivatives of its own"):
        torch.ops.i2v_kernels.token_shift_backward(x, [1], [1], "zeros", 0, 3, 1, False, "")


def modules():
    torch.manual_seed(0)
    yield i2v_nn.TokenShift.tsm(16)
    yield i2v_nn.TokenShift.ts2net(16, n_div=2)
    yield i2v_nn.TokenT1D(16)
    yield i2v_nn.TemporalAttention(16, 2)
    yield i2v_nn.TemporalConv(16, (3, 1, 1))
    yield i2v_nn.BottleneckAdapter(16, 4)
    yield i2v_nn.STAdapter(16, 4, (3, 1, 1))
    yield i2v_nn.LoRALinear(torch.nn.Linear(16, 16), rank=2)


@pytest.mark.parametrize("module", list(modules()), ids=lambda module: type(module).__name__)
def test_modules(module):
    """Tangents against finite differences; gradients of gradients; ensembles by ``stack_module_state``."""
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, along = torch.randn(2, 1, 4, 5, 16, dtype=torch.float64)
    tangent, step = jvp(module, (x,), (along,))[1], 1e-6
    with torch.no_grad():
        torch.testing.assert_close(tangent, (module(x + step * along) - module(x - step * along)) / (2 * step))
    assert torch.autograd.gradgradcheck(module, with_grad([x]), fast_mode=True, atol=1e-6)
    if not list(module.parameters()):
        return
    parameters, buffers = stack_module_state([module, module])
    got = vmap(lambda p, b: functional_call(module, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(got[1], module(x))
