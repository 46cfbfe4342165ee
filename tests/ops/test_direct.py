"""Ops call their kernels in Python without the dispatcher, but only where it has nothing else to do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import i2v_kernels as i2v
from i2v_kernels.ops import dispatcher
from i2v_kernels.ops.base import OPS

OP = OPS["lora_linear"]  # in Python on CPUs too


@pytest.fixture
def tensors():
    return [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (6, 8), (4, 8), (6, 4), (6,))]


def call(tensors):
    x, weight, a, b, bias = tensors
    return i2v.lora_linear(x, weight, a, b, bias, scaling=0.5)


@pytest.fixture
def dispatched(monkeypatch):
    """The calls that the dispatcher sees."""
    seen = []
    for name in ("forward_op", "backward_op"):
        op = getattr(OP, name)
        monkeypatch.setattr(OP, name, lambda *args, op=op, name=name: seen.append(name) or op(*args))
    return seen


def test_ordinary_calls_are_direct(tensors, dispatched):
    direct = torch.autograd.grad(call(tensors).sum(), tensors)
    with torch.no_grad():
        call(tensors)
    with torch.inference_mode():
        out = call(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(tensors).dtype == torch.bfloat16
    assert dispatched == [] and out.is_inference()
    x, weight, a, b, bias = tensors
    want = torch.nn.functional.linear(x, weight, bias) + 0.5 * (x @ a.t()) @ b.t()
    for got, wanted in zip(direct, torch.autograd.grad(want.sum(), tensors)):
        torch.testing.assert_close(got, wanted)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_ops(tensors):
    with Seen() as seen:
        torch.autograd.grad(call(tensors).sum(), tensors)
    assert "i2v_kernels::lora_linear" in seen.names and "i2v_kernels::lora_linear_backward" in seen.names
    out = call(tensors).sum()
    with Seen() as seen:  # entered between the two
        torch.autograd.grad(out, tensors)
    assert "i2v_kernels::lora_linear_backward" in seen.names


def test_the_package_may_be_imported_under_a_mode():
    with Seen(), torch.inference_mode():
        assert tuple(keys.raw_repr() for keys in dispatcher.outermost()[::2]) == dispatcher.ORDINARY
        assert dispatcher.included().raw_repr() not in dispatcher.ORDINARY


def test_function_modes_see_ops(tensors):
    names = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        call(tensors)
    assert "i2v_kernels.lora_linear.default" in names


def test_profilers_see_ops(tensors):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(call(tensors).sum(), tensors)
    names = {event.key for event in profile.key_averages()}
    assert {"i2v_kernels::lora_linear", "i2v_kernels::lora_linear_backward"} <= names


def test_subclasses_see_ops(tensors):
    names = []

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            names.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = tensors[0].detach().as_subclass(Sub)
    assert isinstance(call([x, *tensors[1:]]), Sub) and "i2v_kernels.lora_linear.default" in names


def test_transforms_go_through_the_dispatcher(tensors, dispatched):
    x, *others = [t.detach() for t in tensors]
    torch.func.grad(lambda x: call([x, *others]).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        call([torch.autograd.forward_ad.make_dual(x, x), *others])
        with torch.no_grad():
            call([torch.autograd.forward_ad.make_dual(x, x), *others])
    assert dispatched == 3 * ["forward_op"]


def test_lazy_negation_is_resolved():
    """The dispatcher turns a view that is to be negated into numbers; a kernel that reads memory would see the wrong sign."""
    z = torch.complex(torch.randn(4, 1), torch.randn(4, 1))
    x = z.conj().imag
    assert x.is_neg()
    ones = [torch.ones(shape) for shape in ((1, 1), (1, 1), (1, 1))]
    assert not OP._direct((x, *ones))
    torch.testing.assert_close(call([x, *ones, None]), -z.imag * 1.5)


def test_checkpoint_and_hooks(tensors):
    want = torch.autograd.grad(call(tensors).sum(), tensors)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        out = call(tensors)
    again = torch.utils.checkpoint.checkpoint(lambda *t: call(t), *tensors, use_reentrant=False)
    for got in (out, again):
        for grad, wanted in zip(torch.autograd.grad(got.sum(), tensors), want):
            torch.testing.assert_close(grad, wanted, rtol=0, atol=0)
    assert packed


def test_an_enum_is_a_number():
    import enum

    One = enum.IntEnum("One", {"one": 1})
    x, weight = torch.randn(1, 2, 4, 3, requires_grad=True), torch.randn(3, 1, 3, 1, 1)
    out = i2v.temporal_conv(x, weight, prefix=One.one, backend="reference")
    torch.testing.assert_close(out, i2v.temporal_conv(x, weight, prefix=1, backend="reference"))
