"""Tracers and exporters on patched models: they see the original."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from architectures import MODELS, trained
from published import AIMAdapter
from torch import nn
from twins import Named, output, twins

import i2v_kernels as i2v

TRACED = ["aim adapters", "aim blocks", "tsm", "timesformer blocks", "open_clip", "conv adapters"]


def operators(graph: Any) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("name", TRACED)
def test_jit_trace(name: str) -> None:
    model, x = MODELS[name][0]()
    i2v.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    assert "i2v_kernels" not in str(traced.inlined_graph)
    torch.testing.assert_close(output(traced, x), output(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["aim adapters", "conv adapters", "open_clip", "tsm"])
def test_export_with_a_dynamic_batch(name: str) -> None:
    model, x = MODELS[name][0]()
    i2v.patch(model.eval())
    size = 4 * torch.export.Dim("clips", min=1, max=64) if name == "tsm" else torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: size},))
    assert not any("i2v_kernels" in target for target in operators(program.graph))
    more = torch.cat([x, x, x])
    torch.testing.assert_close(output(program.module(), more), output(model, more), rtol=1e-4, atol=1e-4)


def test_the_model_itself_has_the_signature_that_it_had() -> None:
    """By which exporters name its inputs."""
    model, plain = twins(trained(Named()))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    x = torch.randn(3, 8)
    for shapes in ({"x": {0: torch.export.Dim("batch")}}, ({0: torch.export.Dim("batch")},)):
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(torch.cat([x, x])), plain(torch.cat([x, x])))


def test_fx() -> None:
    model, plain = twins(trained(nn.Sequential(Named(), AIMAdapter(8))))
    graph, x = torch.fx.symbolic_trace(model), torch.randn(3, 8)
    torch.testing.assert_close(graph(x), plain(x))
    assert {node.target for node in graph.graph.nodes if node.op == "call_module"} >= {"0.fc1", "1.D_fc1"}


def test_onnx() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, _ = twins(trained(nn.Sequential(Named(), AIMAdapter(8))).eval())
    x = torch.randn(3, 8)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: "batch"},))
    assert program is not None and "i2v_kernels" not in str(program.model)
