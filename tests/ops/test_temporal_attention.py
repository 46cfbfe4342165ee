"""What is particular to temporal_attention: log-sum-exps, long clips, packed tensors, and what the options mean together."""

from __future__ import annotations

import pytest
import torch
from test_correct import ISAS, compare, isa, needs_extension, run  # noqa: F401  (a fixture)

import i2v_kernels as i2v
from i2v_kernels.testing import OPINFOS

INFO = next(info for info in OPINFOS if info.name == "temporal_attention")
SAMPLES = [pytest.param(sample, id=sample.name) for sample in INFO.samples()]


def log_sum_exp(sample, dtype, backend, info=INFO):
    """Within float32's rounding of the float64 definition, from the same inputs; minus infinity where there is no key."""
    low = sample.to(dtype)
    out, got = info.op(*low.args, **low.kwargs, return_lse=True, backend=backend)
    want = info.op(*low.to(torch.float64).args, **low.to(torch.float64).kwargs, return_lse=True, backend="reference")[1]
    assert torch.equal(out.nan_to_num(), info.op(*low.args, **low.kwargs, backend=backend).nan_to_num())
    assert got.shape == out.shape[:-1] and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_log_sum_exp(sample, dtype, isa):  # noqa: F811
    log_sum_exp(sample, dtype, "cpu")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_parts_of_the_keys_join_by_their_log_sum_exps(backend):
    """What the log-sum-exp is for: attention to 7 frames and to 5 more is attention to 12."""
    q, k, v = torch.randn(3, 2, 12, 3, 2, 16).unbind(0)
    q = q[:, :4].requires_grad_()
    parts = (slice(7), slice(7, 12))
    out, lse = zip(*(i2v.temporal_attention(q, k[:, p], v[:, p], return_lse=True, backend=backend) for p in parts))
    assert not any(x.requires_grad for x in lse)
    share = torch.stack(lse).softmax(0)[..., None]
    torch.testing.assert_close(share[0] * out[0] + share[1] * out[1], i2v.temporal_attention(q, k, v, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", [p for p in SAMPLES if p.id not in ("nan in q", "inf in k", "large scores", "one frame")])
def test_sdpa(sample, dtype):
    """Where numbers are tame: on others PyTorch's own kernels differ from its own formula."""
    compare(INFO, sample, dtype, "sdpa")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sdpa_of_one_frame(dtype):
    """Weights are one, whatever q and k are: their gradients cancel to rounding, which has no relative error."""
    sample = next(p.values[0] for p in SAMPLES if p.id == "one frame").to(dtype, requires_grad=True)
    out, *gradients = run(INFO, sample, "sdpa")
    want, *exact = run(INFO, sample, "reference")
    assert torch.equal(out, want) and torch.equal(gradients[2], exact[2])
    for got, zero in zip(gradients[:2], exact[:2]):
        assert not zero.any() and got.stride() == zero.stride()
        assert got.abs().max() <= 4 * torch.finfo(dtype).eps * exact[2].abs().max()


def test_long_clips_take_the_route_through_sdpa():
    q = torch.randn(2, 130, 3, 2, 16, requires_grad=True)
    k, v = (torch.randn(2, 140, 3, 2, 16, requires_grad=True) for _ in range(2))
    options = {"causal": True, "mask": torch.rand(2, 140) > 0.3}
    explained = i2v.explain(i2v.temporal_attention, q, k, v, **options)
    assert explained.backend == "sdpa" and explained.reasons["sdpa"] == "first choice that can run"
    assert i2v.explain(i2v.temporal_attention, q, k, v, backend="cpu").backend == "cpu"
    outs = [i2v.temporal_attention(q, k, v, **options, backend=backend) for backend in (None, "cpu", "reference")]
    grads = [torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) for out in outs]
    for out, grad in zip(outs[:2], grads):
        torch.testing.assert_close(out, outs[2])
        for g, w in zip(grad, grads[2]):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
    assert i2v.temporal_attention(q, k, v, return_lse=True)[1].shape == (2, 130, 3, 2)


def test_offsets_are_shifted_keys_and_values():
    """As ZeroI2V writes it: the first head sees the previous frame, the second the next; edges keep their own."""
    q, k, v = torch.randn(3, 2, 8, 5, 4, 16).unbind(0)
    groups = [(16, 1), (16, -1)]  # token_shift counts the other way: where a frame goes
    shifted = [i2v.token_shift(x.flatten(3), groups, padding="edge").unflatten(3, (4, 16)) for x in (k, v)]
    got = i2v.temporal_attention(q, k, v, offsets=[-1, 1, 0, 0], window=(1, 1))
    torch.testing.assert_close(got, i2v.temporal_attention(q, *shifted, window=(1, 1)))


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_is_the_same_to_the_bit_and_leaves_a_packed_gradient(compiled):
    torch._dynamo.reset()
    wide = torch.randn(5, 2, 8, 3 * 48 + 8).permute(1, 2, 0, 3)  # sequence first, inside a wider buffer
    qkv = wide[..., :-8].unflatten(3, (3, 4, 12)).requires_grad_()
    mask = torch.arange(8).expand(2, 8) < torch.tensor([[8], [5]])

    def step(x):
        return i2v.temporal_attention(x, mask=mask, causal=True)

    out = (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(qkv)
    want = i2v.temporal_attention(*qkv.unbind(3), mask=mask, causal=True)
    grad = torch.randn_like(out)
    (got,), (stacked,) = (torch.autograd.grad(y, qkv, grad) for y in (out, want))
    assert torch.equal(out, want) and out.stride() == want.stride()
    assert torch.equal(got, stacked) and got.stride() == torch.empty_like(qkv).stride()


@pytest.mark.parametrize("compiled", [False, True])
def test_every_option_at_once_compiles(compiled):
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 6, 3, 2, 16, requires_grad=True).unbind(0)

    def step(q, k, v):
        out, lse = i2v.temporal_attention(q[:, :4], k, v, offsets=[1, 0], window=(2, 1), causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    function = torch.compile(step, fullgraph=True, backend="inductor") if compiled else step
    want = torch.autograd.grad(step(q, k, v), (q, k, v))
    for got, w in zip(torch.autograd.grad(function(q, k, v), (q, k, v)), want):
        torch.testing.assert_close(got, w)
