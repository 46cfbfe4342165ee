"""Patched models give what they gave: outputs, gradients, and after unpatching the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import MODELS
from torch import Tensor, nn

import i2v_kernels as i2v


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result[0]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = output(model, x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"x": x.grad}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    make, classes = MODELS[request.param]
    return (*make(), classes)


def test_replaced_classes(model: Any) -> None:
    module, _, classes = model
    report = i2v.patch(module)
    assert {row.kind for row in report.replaced} == classes
    assert not report.refused, report


def test_outputs_and_gradients(model: Any) -> None:
    module, x, _ = model
    exact = copy.deepcopy(module).double()
    expected, wanted = output(exact, x.double()), gradients(exact, x.double())
    plain_error = (output(module, x) - expected).abs().max()
    i2v.patch(module)
    with torch.no_grad():  # both ways: some choose by whether a gradient is wanted
        assert (output(module, x) - expected).abs().max() <= 2 * plain_error + 1e-6
    assert (output(module, x) - expected).abs().max() <= 2 * plain_error + 1e-6
    found = gradients(module, x)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).abs().max() <= 1e-5 * max(grad.abs().max(), 1), name


def test_double_precision_is_equal(model: Any) -> None:
    """To float64's rounding: no approximation hides in float32's."""
    module, x, _ = model
    module, x = module.double(), x.double()
    expected, wanted = output(module, x).detach(), gradients(module, x)
    i2v.patch(module)
    torch.testing.assert_close(output(module, x), expected, rtol=1e-11, atol=1e-11)
    for name, grad in gradients(module, x).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-10, msg=name)


def test_unpatch_restores_the_same_bits(model: Any) -> None:
    module, x, _ = model
    before, forwards = output(module, x), {name: "forward" in m.__dict__ for name, m in module.named_modules()}
    i2v.patch(module)
    assert i2v.unpatch(module) is module
    assert {name: "forward" in m.__dict__ for name, m in module.named_modules()} == forwards
    assert torch.equal(output(module, x), before)


def test_autocast(model: Any) -> None:
    module, x, _ = model
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(module, x)
    i2v.patch(module)
    with torch.autocast("cpu", torch.bfloat16):
        got = output(module, x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = output(module, x).float().square().mean()
    loss.backward()  # dtypes of gradients fit


def test_compiles_and_exports_as_before(model: Any) -> None:
    """Without a break in the graph, unless there was one."""
    module, x, _ = model

    def whole() -> str:
        torch._dynamo.reset()
        try:
            torch.compile(module, backend="aot_eager", fullgraph=True)(x)
            torch.export.export(module, (x,))
        except Exception as error:
            return str(error)
        return ""

    i2v.patch(module)
    broken = whole()
    if broken:
        i2v.unpatch(module)
        assert whole(), broken
        i2v.patch(module)
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(output(compiled, x), output(module, x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(output(compiled, x), output(module, x), rtol=1e-4, atol=1e-5)
