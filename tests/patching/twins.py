"""A model patched and not, held against each other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import i2v_kernels as i2v

CHEAP = [
    "timesformer divided",
    "tsm",
    "aim blocks",
    "x-clip blocks",
    "open-vclip blocks",
    "clip-vip layers",
    "st-adapter blocks",
    "timesformer blocks",
    "evl",
]


class Named(nn.Module):
    """A perceptron as models have it."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), act or nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def results(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Output and gradients of inputs and parameters, from the same random numbers each time."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(2)
    out = module(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, grad, allow_unused=True)]


def output(model: nn.Module, *inputs: Any) -> Tensor:
    result = model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))  # some write into their input
    return result if isinstance(result, Tensor) else result[0]


def agree(fast: nn.Module, plain: nn.Module, *inputs: Any) -> None:
    """In outputs and gradients."""
    found = []
    for model in (fast, plain):
        given = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        out = output(model, *given)
        learning = [p for p in model.parameters() if p.requires_grad]
        found.append([out, *torch.autograd.grad(out.square().sum(), [given[0], *learning], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(1, b.abs().max().item()))


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Patched, and not."""
    plain = copy.deepcopy(model)
    assert i2v.patch(model).replaced
    return model, plain
