"""What LoRA tools, offloading, pruning and others do to a layer: a patched model heeds it, done before patching or after."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from architectures import MODELS, trained
from published import AIMAdapter, QuickGELU
from torch import nn
from twins import CHEAP, Named, agree, output, twins

import i2v_kernels as i2v

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def wrap_forward(layer: nn.Module) -> None:
    own = layer.forward
    layer.forward = lambda x: 1.5 * own(x)  # type: ignore[method-assign]


def forward_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, out: 1.5 * out)


def pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


def backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda module, grads, outs: tuple(None if g is None else 1.5 * g for g in grads))


def backward_pre_hook(layer: nn.Module) -> None:
    layer.register_full_backward_pre_hook(lambda module, outs: tuple(1.5 * g for g in outs))


def weight_norm(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data *= 1.5


def weight_norm_by_hook(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(layer)
    layer.weight_g.data *= 1.5


def prune(layer: nn.Module) -> None:
    nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


def derive(layer: nn.Module) -> None:
    """As bitsandbytes' and quantisers' layers, whose class says something else."""
    kind = type(layer)
    layer.__class__ = type("Quantised", (kind,), {"forward": lambda self, x: 1.5 * kind.forward(self, x)})


CHANGES = [
    wrap_forward,
    forward_hook,
    pre_hook,
    backward_hook,
    backward_pre_hook,
    weight_norm,
    weight_norm_by_hook,
    prune,
    derive,
]


@pytest.mark.parametrize(
    ("name", "before", "change"),
    [("perceptron", before, change) for change in CHANGES for before in (False, True)]
    + [
        (name, False, change)
        for name in ("aim blocks", "st-adapter blocks", "evl", "timesformer divided")
        for change in CHANGES[:2]
    ],
)
def test_layers_that_are_more_than_their_class(name: str, before: bool, change: Callable[[nn.Module], None]) -> None:
    """Whether the layer changed before or after it was patched."""
    torch.manual_seed(0)
    model, x = (trained(nn.Sequential(Named())), torch.randn(3, 8)) if name == "perceptron" else MODELS[name][0]()
    plain = copy.deepcopy(model)
    unchanged = output(model, x)
    if not before:
        assert i2v.patch(model).replaced
    for each in (model, plain):
        for layer in [m for m in each.modules() if type(m) in LAYERS]:
            change(layer)
    if before:
        i2v.patch(model)
    agree(model, plain, x)
    if "backward" not in change.__name__:
        assert not torch.allclose(output(model, x), unchanged)


@pytest.mark.parametrize("name", CHEAP)
def test_a_layer_at_a_time(name: str) -> None:
    """Of each model's: a replacement that passes over it takes the original."""
    model, x = MODELS[name][0]()
    model, plain = twins(model)
    kinds = (*LAYERS, nn.GELU, QuickGELU, AIMAdapter, nn.Dropout)
    places = {re.sub(r"\b\d+\.", "", path): path for path, part in model.named_modules() if type(part) in kinds}  # of one block
    for path in places.values():
        part, own = model.get_submodule(path), plain.get_submodule(path)
        if path:
            handles = [m.register_forward_hook(lambda module, args, out: 1.5 * out) for m in (part, own)]
            torch.testing.assert_close(output(model, x), output(plain, x), rtol=1e-3, atol=1e-3)
            for handle in handles:
                handle.remove()


def test_hooks_of_all_modules() -> None:
    model, plain = twins(nn.Sequential(Named()))
    x, seen = torch.randn(3, 8), []
    with_all = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        plain(x)
        expected, seen[:] = list(seen), []
        model(x)
    finally:
        with_all.remove()
    assert seen == expected and nn.Linear in seen


def test_a_class_whose_forward_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.Linear's, as quantisers do, and that of the module itself."""
    model, plain = twins(nn.Sequential(Named()))
    x, own = torch.randn(3, 8), nn.Linear.forward
    with monkeypatch.context() as m:
        m.setattr(nn.Linear, "forward", lambda self, x: 2 * own(self, x))
        assert torch.equal(model(x), plain(x))
    with monkeypatch.context() as m:
        m.setattr(Named, "forward", lambda self, x: x)
        assert torch.equal(model(x), x)
