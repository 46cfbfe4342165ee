"""What is particular to lora_linear: frozen parts, what it keeps, PEFT's names, merging."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import i2v_kernels.nn as i2v_nn
from i2v_kernels.testing import OPINFOS

INFO = next(info for info in OPINFOS if info.name == "lora_linear")


def trained(**options):
    """A layer whose update is not zero."""
    layer = i2v_nn.LoRALinear(torch.nn.Linear(24, 18), rank=4, alpha=6, **options)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


@pytest.mark.parametrize("backend", ["library", "reference"])
def test_only_what_is_wanted_has_a_gradient(backend):
    """Any of the five alone and any pair, to the numbers that come of all five together."""
    sample = INFO.samples()[0].to(requires_grad=True)
    tensors, grad = sample.tensors(), torch.randn(2, 4, 5, 18, dtype=torch.float64)
    every = torch.autograd.grad(INFO.op(*tensors, backend=backend), tensors, grad)
    for wanted in (*itertools.combinations(range(5), 1), *itertools.combinations(range(5), 2)):
        args = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        got = torch.autograd.grad(INFO.op(*args, backend=backend), [args[i] for i in wanted], grad)
        for i, g in zip(wanted, got):
            torch.testing.assert_close(g, every[i])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_keeps_its_arguments_alone(dtype):
    """Under autocast too: there they are what was cast."""
    layer, x, kept = trained(), torch.randn(2, 4, 5, 24, requires_grad=True), []
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t)
    with torch.autocast("cpu", dtype, enabled=dtype is not None), keeping:
        out = layer(x)
    assert out.dtype == (dtype or torch.float32)
    assert kept == [(2, 4, 5, 24), (18, 24), (4, 24), (18, 4), (18,)]


@pytest.mark.parametrize("freeze", [True, False])
def test_trains_the_base_only_if_asked(freeze):
    layer = trained(freeze=freeze)
    layer(torch.randn(3, 24)).sum().backward()
    learns = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    base = set() if freeze else {"base_layer.weight", "base_layer.bias"}
    assert learns == {"lora_A.default.weight", "lora_B.default.weight"} | base


def test_names_and_numbers_of_peft():
    """What PEFT's LoraLayer computes, from its state dict; its rank-stabilised form too."""
    layer, x = trained().double(), torch.randn(5, 24, dtype=torch.float64)
    state = layer.state_dict()
    names = ["base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"]
    assert list(state) == names
    weight, bias, a, b = state.values()
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * 6 / 4)
    assert i2v_nn.LoRALinear(torch.nn.Linear(2, 2), 4, 6, rslora=True).scaling == 3


def test_merging_and_back():
    model, x = torch.nn.Sequential(trained(), torch.nn.ReLU(), torch.nn.Linear(18, 24), trained()), torch.randn(5, 24)
    before, weight = model(x), model[0].base_layer.weight.clone()
    for _ in range(2):  # the second time changes nothing
        assert i2v_nn.merge_lora(model) == 2
        torch.testing.assert_close(model(x), before)
    assert not torch.allclose(model[0].base_layer.weight, weight) and "merged=True" in repr(model[0])
    for _ in range(2):
        assert i2v_nn.unmerge_lora(model) == 2
        torch.testing.assert_close(model[0].base_layer.weight, weight)
        torch.testing.assert_close(model(x), before)


def test_half_precision_merges_in_float32():
    layer = trained().to(torch.bfloat16)
    parts = [layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight]
    weight, b, a = (p.detach().float() for p in parts)
    layer.merge()
    assert torch.equal(layer.base_layer.weight, (weight + 1.5 * (b @ a)).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    (
        ((torch.nn.Conv1d(2, 2, 1),), TypeError, "base_layer must be an nn.Linear, got Conv1d"),
        ((torch.nn.Linear(2, 2), 0), ValueError, "rank=0 must be at least 1"),
        ((torch.nn.Linear(2, 2), 0.5), TypeError, "rank=0.5 must be an int"),
    ),
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        i2v_nn.LoRALinear(*arguments)


@pytest.mark.parametrize("rslora", [False, True])
def test_state_dicts_are_those_of_peft(rslora):
    """PEFT's own layer: what it saves loads here and gives its outputs, and the other way round."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, use_rslora=rslora)
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 24)), config).base_model.model[0]
    ours, x = i2v_nn.LoRALinear(torch.nn.Linear(16, 24), rank=4, alpha=6, rslora=rslora), torch.randn(3, 16)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    for p in ours.parameters():
        torch.nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
