"""The ops as citizens of PyTorch: opcheck, compile, export, autocast, checkpointing, meta tensors, backend choice."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from test_correct import telling

import i2v_kernels as i2v
from i2v_kernels.ops import base
from i2v_kernels.testing import OPINFOS

CALLS = [pytest.param(info, sample, id=f"{info}-{sample.name}") for info in OPINFOS for sample in info.samples()]
FIRST = [pytest.param(info, info.samples()[0], id=str(info)) for info in OPINFOS]


def schema_args(info, sample):
    """The arguments that the public function hands to the registered op."""
    calls = []
    with base.OPS[info.name].recording(calls):
        info.op(*sample.args, **sample.kwargs)
    return calls[0]


@pytest.mark.parametrize("info, sample", CALLS)
def test_opcheck(info, sample):
    call = schema_args(info, sample.to(torch.float32, requires_grad=True))
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(base.OPS[info.name].forward_op, call, test_utils=utils)


@pytest.mark.parametrize("info, sample", telling(OPINFOS))
def test_opcheck_of_dynamic_shapes(info, sample):
    call = schema_args(info, sample.to(torch.float32, requires_grad=True))
    torch.library.opcheck(base.OPS[info.name].forward_op, call, test_utils=["test_aot_dispatch_dynamic"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("info, sample", FIRST)
def test_compile(info, sample, backend):
    torch._dynamo.reset()
    sample = sample.to(torch.float32, requires_grad=True)

    def step(*tensors):
        args = iter(tensors)
        call = [next(args) if isinstance(a, torch.Tensor) else a for a in sample.args]
        return info.op(*call, **sample.kwargs).sin()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    want, got = step(*sample.inputs()), compiled(*sample.inputs())
    torch.testing.assert_close(got, want)
    grad = torch.ones_like(want)
    for g, w in zip(
        torch.autograd.grad(got, sample.tensors(), grad), torch.autograd.grad(want, sample.tensors(), grad), strict=True
    ):
        torch.testing.assert_close(g, w)


def test_compile_with_dynamic_batch_and_tokens():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: i2v.token_shift(x, [(4, 1)]) + i2v.temporal_attention(*[x.unflatten(3, (2, 8))] * 3).flatten(3),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, tokens in ((2, 3), (5, 4), (3, 9)):
        x = torch.randn(batch, 4, tokens, 16)
        want = i2v.token_shift(x, [(4, 1)]) + i2v.temporal_attention(*[x.unflatten(3, (2, 8))] * 3).flatten(3)
        torch.testing.assert_close(compiled(x), want)


@pytest.mark.parametrize("info, sample", FIRST)
def test_export(info, sample):
    sample = sample.to(torch.float32)

    class Call(torch.nn.Module):
        def forward(self, *tensors):
            args = iter(tensors)
            return info.op(*[next(args) if isinstance(a, torch.Tensor) else a for a in sample.args], **sample.kwargs)

    program = torch.export.export(Call(), tuple(sample.inputs()))
    assert f"i2v_kernels.{info.name}" in program.graph_module.code
    torch.testing.assert_close(program.module()(*sample.inputs()), info.op(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("info, sample", FIRST)
def test_autocast_follows_pytorch(info, sample):
    sample = sample.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = info.op(*sample.args, **sample.kwargs)
    assert out.dtype == (torch.bfloat16 if info.autocasts and not info.wide else torch.float32)


@pytest.mark.parametrize("info, sample", FIRST)
def test_activation_checkpointing(info, sample):
    sample = sample.to(torch.float32, requires_grad=True)

    def step(*_):
        return info.op(*sample.args, **sample.kwargs).square().sum()

    want = torch.autograd.grad(step(), sample.tensors())
    saved = torch.utils.checkpoint.checkpoint(step, *sample.tensors(), use_reentrant=False)
    for g, w in zip(torch.autograd.grad(saved, sample.tensors()), want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("info, sample", FIRST)
def test_expanded_gradient(info, sample):
    """``.sum().backward()`` sends a gradient of stride 0."""
    sample = sample.to(torch.float64, requires_grad=True)
    got = torch.autograd.grad(info.op(*sample.args, **sample.kwargs).sum(), sample.tensors())
    want = torch.autograd.grad(info.op(*sample.args, **sample.kwargs, backend="reference").sum(), sample.tensors())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("info, sample", FIRST)
def test_no_gradient_for_the_output(info, sample):
    class Ignore(torch.autograd.Function):
        @staticmethod
        def forward(ctx, ignored, passed):
            return passed.clone()

        @staticmethod
        def backward(ctx, grad):
            return None, grad

    sample = sample.to(torch.float32, requires_grad=True)
    passed = torch.ones(3, requires_grad=True)
    Ignore.apply(info.op(*sample.args, **sample.kwargs), passed).sum().backward()
    assert torch.equal(passed.grad, torch.ones(3)) and all(t.grad is None for t in sample.tensors())


@pytest.mark.parametrize("info, sample", FIRST)
def test_explain(info, sample):
    sample = sample.to(torch.float32)
    explained = i2v.explain(info.op, *sample.args, **sample.kwargs)
    assert explained.backend in ("cpu", "sdpa", "library", "reference")
    assert set(explained.reasons) == set(base.BACKENDS)
    assert explained.reasons["triton"].startswith("cannot: ")
    assert f"-> {explained.backend}" in str(explained)
    assert i2v.explain(info.op, *sample.args, **sample.kwargs, backend="reference").backend == "reference"


def test_explain_is_of_its_thread():
    """What others call meanwhile is computed, and not part of the answer."""
    x, done = torch.randn(1, 2, 3, 4), []

    def elsewhere():
        done.extend((i2v.token_shift(x, [(4, 1)]), i2v.explain(i2v.token_shift, x, [(1, 1)], backend="reference")))

    calls = []
    with base.OPS["token_shift"].recording(calls):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert calls == []
        i2v.token_shift(x, [(2, 1)])
    assert len(calls) == 1 and calls[0][1] == [2]
    assert torch.equal(done[0], i2v.token_shift(x, [(4, 1)])) and done[1].backend == "reference"


def test_explain_refuses_other_functions():
    with pytest.raises(TypeError, match="not an op of i2v_kernels"):
        i2v.explain(torch.nn.functional.relu, torch.zeros(1))


@pytest.mark.parametrize("info, sample", FIRST)
def test_meta_tensors_have_shape_without_memory(info, sample):
    real, meta = sample.to(torch.float32), sample.to(torch.float32, device="meta")
    got, want = info.op(*meta.args, **meta.kwargs), info.op(*real.args, **real.kwargs)
    assert got.is_meta and got.shape == want.shape and got.stride() == want.stride()


def test_backend_from_the_environment():
    code = (
        "import torch, i2v_kernels as i2v; x = torch.zeros(1, 2, 3, 4);print(i2v.explain(i2v.token_shift, x, [(1, 1)]).backend)"
    )

    def run(value):
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"I2V_KERNELS_BACKEND": value}, check=False
        )

    assert run("reference").stdout.strip() == "reference"
    assert "I2V_KERNELS_BACKEND='magic'" in run("magic").stderr
    assert "cannot run this call" in run("cuda").stderr


def test_a_backend_from_the_environment_is_for_the_ops_that_have_it():
    code = (
        "import torch, i2v_kernels as i2v; from i2v_kernels import info;"
        "x, w = torch.ones(1, 2, 3, 4), torch.ones(4, 4);"
        "print(i2v.explain(i2v.lora_linear, x, w, w, w)); print(i2v.lora_linear(x, w, w, w)[0, 0, 0]);"
        "print(i2v.temporal_attention(torch.ones(1, 200, 1, 1, 4), *[torch.ones(1, 200, 1, 1, 4)] * 2).sum());"
        "print(info.report())"
    )
    env = {"I2V_KERNELS_BACKEND": "library"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert "-> library    asked for by I2V_KERNELS_BACKEND=library" in done.stdout and "tensor(800.)" in done.stdout, (
        done.stderr
    )
    assert "first choice that can run (I2V_KERNELS_BACKEND=library: token_shift has no such backend)" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"I2V_KERNELS_BACKEND": "triton"}, check=False
    )
    assert "-> library    first choice that can run (I2V_KERNELS_BACKEND=triton: lora_linear has no such" in done.stdout
    assert "temporal_attention: backend='triton' cannot run this call" in done.stderr
