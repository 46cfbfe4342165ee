"""Patched models in forward mode, and gradients of gradients: what the original gives, or a sentence; never a silent 0."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import MODELS
from published import QuickGELU
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import i2v_kernels as i2v
from i2v_kernels.patching import mlp

# One for each kind of replacement.
NAMES = ("timesformer blocks", "tsm", "conv adapters", "aim blocks", "x-clip blocks", "open-vclip blocks", "clip-vip layers")


def both(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The original, the same model patched, and an input, in float64."""
    torch.manual_seed(0)
    model, x = MODELS[name][0]()
    model = model.double().eval()
    patched = copy.deepcopy(model)
    assert i2v.patch(patched).replaced
    return model, patched, x.double()


def output(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    return result if isinstance(result, Tensor) else result[0]


def tangents(model: nn.Module, x: Tensor) -> Any:
    """Along x and the parameters alike."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def call(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        result = functional_call(model, parameters, (x,))
        return result if isinstance(result, Tensor) else result[0]

    return jvp(call, (x, parameters), (x.cos(), {name: p.sin() for name, p in parameters.items()}))


def second(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradient of the gradient's square. The incoming gradient is a constant, which needs none itself."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(output(model, x).sin().sum(), x, create_graph=True)
    return list(torch.autograd.grad(gradient.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)][:4]))


@pytest.mark.parametrize("name", NAMES)
def test_tangents(name: str) -> None:
    model, patched, x = both(name)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no forward mode
        for got, want in zip(tangents(patched, x), tangents(model, x)):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
            assert want.any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, patched, x = both(name)
    with sdpa_kernel(SDPBackend.MATH):
        want = second(model, x)
        try:
            got = second(patched, x)
        except NotImplementedError as error:
            assert "a patched perceptron has no gradients of gradients" in str(error)
            monkeypatch.setattr(mlp, "may_fuse", lambda *parts: False)  # all but the perceptrons
            got = second(patched, x)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", [nn.GELU(), QuickGELU()], ids=["gelu", "quick"])
def test_a_perceptron_says_that_it_has_none(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(8, 32), activation, nn.Linear(32, 8))
    i2v.patch(model)
    x = torch.randn(5, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"no gradients of gradients \(create_graph=True\).*unpatch\(\)"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
