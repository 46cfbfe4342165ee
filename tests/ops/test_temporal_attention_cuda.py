"""What the warps of temporal_attention's CUDA kernels compute, over the whole grid, against the definition.

Run on the CPU by the kernels' emulation, and by the kernels themselves where there is a GPU.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from emulation import device_fixture
from test_correct import compare
from test_temporal_attention import INFO, log_sum_exp
from torch._subclasses.fake_tensor import FakeTensorMode

from i2v_kernels import _extension
from i2v_kernels.ops.temporal_attention import cuda
from i2v_kernels.testing import Sample

pytestmark = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))
HALVES = (torch.float16, torch.bfloat16)


device = device_fixture("temporal_attention", lambda *args: cuda.limits(*args[:3]))


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call(name, b, t, n, h, d, keys=None, *, bias=False, mask=False, **options):
    keys = keys or t
    q, k, v = randn(b, t, n, h, d), randn(b, keys, n, h, d, seed=1), randn(b, keys, n, h, d, seed=2)
    if bias:
        options["bias"] = randn(h, t, keys, seed=3)
    if mask:
        options["mask"] = torch.arange(keys)[None] % 3 != torch.arange(b)[:, None]
    return Sample(name, (q, k, v), options)


def packed(name, b, t, n, h, d, order, **options):
    """One buffer whose dimensions lie in `order` in memory, as a packed projection leaves it."""
    sizes = [(b, t, n)[i] for i in order]
    x = randn(*sizes, 3, h, d).permute(*[order.index(i) for i in range(3)], 3, 4, 5)
    return Sample(name, (x,), options)


def spoiled(sample, which, value):
    """With one number of q, k or v that is not finite."""
    sample.args[which][0, 1, 0, 0, 3] = value
    return sample


SAMPLES = [
    *(s for s in INFO.samples() if cuda.limits(*(*s.to(torch.float16).args, None, None)[:3]) is None),
    call("several columns of channels", 1, 8, 3, 2, 256, bias=True),
    call("columns and a rest", 2, 7, 3, 1, 136, mask=True),
    call("T16 D80", 2, 16, 2, 2, 80, bias=True, causal=True),
    call("T12, 9 keys", 1, 12, 3, 2, 72, 9, mask=True, bias=True),
    call("T32, all", 2, 32, 2, 2, 40, bias=True, mask=True, window=(9, 4), offsets=[3, -2]),
    call("T32 D128", 1, 32, 1, 1, 128),
    call("T29, 20 keys, far offsets", 1, 29, 2, 3, 24, 20, offsets=[-20, 19, 7], mask=True),
    call("T3, 31 keys", 1, 3, 2, 2, 16, 31, causal=True),
    call("T8, all heads shifted", 2, 8, 3, 2, 64, offsets=[1, -7], bias=True, mask=True, window=(2, 3)),
    call("many heads", 1, 2, 2, 256, 8, bias=True),
    spoiled(call("nan in q, later keys", 1, 7, 2, 2, 16, offsets=[2, 0]), 0, float("nan")),
    spoiled(call("nan in q, T20, earlier keys", 1, 20, 1, 2, 16, offsets=[-3, 0]), 0, float("nan")),
    *(spoiled(call(f"inf in {'qkv'[i]}, T{t}", 1, t, 2, 1, 16), i, float("inf")) for i in range(3) for t in (5, 11, 25)),
    packed("packed, sequence first", 2, 8, 5, 2, 32, (2, 0, 1), causal=True),
    packed("packed, frames last", 1, 16, 3, 2, 64, (0, 2, 1)),
]
EACH = pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in SAMPLES])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EACH
def test_matches_the_definition(sample, dtype, device):
    compare(INFO, sample.to(device=device), dtype, "cuda")


@EACH
def test_log_sum_exp(sample, device):
    log_sum_exp(sample.to(device=device), torch.bfloat16, "cuda")


@pytest.mark.parametrize("frames", [4, 8, 16, 32])
def test_models(frames, device):
    """A few tokens of ViT-B/16: the sizes that are meant to be fast."""
    compare(INFO, call("", 1, frames, 3, 12, 64).to(device=device), torch.bfloat16, "cuda")


@pytest.mark.parametrize("shares", [1, 3, 1000])
def test_bias_gradient_by_any_number_of_shares(shares, device, monkeypatch):
    sample = call("", 2, 6, 7, 2, 16, bias=True)
    monkeypatch.setattr(cuda, "WARPS", 2 * shares)
    compare(INFO, sample.to(device=device), torch.float16, "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["q", "k", "v", "gradient"])
@pytest.mark.parametrize("frames", [6, 13])
def test_sequences_of_a_warp_are_apart(frames, place, value, device):
    """What is not finite in one token's frames changes no bit of another token's result, forward or backward."""

    def results(spoiled):
        tensors = dict(zip(("q", "k", "v", "gradient"), randn(4, 1, frames, 6, 2, 8).to(device, torch.float16)))
        if spoiled:
            tensors[place][0, 2, 3, 1, 5] = value
        leaves = [tensors[name].requires_grad_() for name in "qkv"]
        out = INFO.op(*leaves, backend="cuda")
        return [out, *torch.autograd.grad(out, leaves, tensors["gradient"])]

    for clean, spoiled in zip(results(False), results(True)):
        clean[0, :, 3, 1] = spoiled[0, :, 3, 1] = 0
        assert torch.equal(clean, spoiled)


def misaligned(*shape):
    """As DLPack may hand it over: the storage itself begins 2 bytes behind a multiple of 16."""
    count = math.prod(shape)
    memory = np.zeros(count + 16, np.float16)
    begin = (2 - memory.ctypes.data) % 16 // 2
    return torch.from_numpy(memory[begin : begin + count]).view(shape)


def test_memory_that_begins_anywhere():
    """It is refused before the launch, gradients are copied, and tensors without memory are judged by their offset."""
    x = misaligned(1, 4, 2, 1, 8)
    assert x.storage_offset() == 0 and x.data_ptr() % 16 == 2
    assert "multiple of 16 bytes" in cuda.limits(x, x, x)
    args = (*torch.randn(3, 1, 4, 2, 1, 8).half().unbind(0), None, None, None, 1.0, -1, -1, False)
    same = x.copy_(torch.randn(x.shape)).clone()
    for got, want in zip(*(cuda.backward(grad, *args) for grad in (x, same))):
        assert torch.equal(got, want)
    for device in (FakeTensorMode(), torch.device("meta")):
        with device:
            wide = torch.empty(1, 4, 2, 1, 16, dtype=torch.float16)
            assert cuda.limits(wide[..., 8:], wide[..., 8:], wide[..., :8]) is None
            assert cuda.limits(wide[..., 1:9], wide[..., 8:], wide[..., 8:]) is not None


@pytest.mark.parametrize(
    ("sample", "text"),
    (
        (call("", 1, 33, 1, 1, 8), "T=33, Tk=33: the kernels take at most 32 frames"),
        (call("", 1, 8, 1, 1, 12), "D=12: the kernels take D in multiples of 8"),
        (call("", 1, 2, 1, 257, 8), "H=257"),
        (Sample("", tuple(randn(3, 1, 4, 2, 1, 20)[..., 2:18].unbind(0))), "a multiple of 16 bytes"),
    ),
)
def test_says_what_it_does_not_take(sample, text, device):
    low = sample.to(torch.float16, device)
    with pytest.raises(NotImplementedError, match=text):
        INFO.op(*low.args, backend="cuda")
    out = torch.empty_like(low.args[0])
    with pytest.raises(RuntimeError):
        torch.ops.i2v_kernels_C.temporal_attention(*low.args, None, None, None, 1.0, -1, -1, out, None)
