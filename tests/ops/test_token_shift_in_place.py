"""``token_shift_`` against the definition: every backend that runs here, values, memory beside it, refusals, compile."""

from __future__ import annotations

import itertools

import pytest
import torch

import i2v_kernels as i2v
from i2v_kernels import _extension
from i2v_kernels.ops.base import INTERPRETED
from i2v_kernels.testing import OPINFOS

INFO = next(info for info in OPINFOS if info.name == "token_shift")
PADDINGS = ["zeros", "edge", *([] if INTERPRETED else ["wrap"])]  # no direction to walk in: not by Triton
SAMPLES = [s for s in INFO.samples() if "residual" not in s.kwargs and s.kwargs.get("padding", "zeros") in PADDINGS]
needs_extension = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))
BACKENDS = ["triton"] if INTERPRETED else ["reference", pytest.param("cpu", marks=needs_extension)]


@pytest.fixture(params=["cpu", *([] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def on(device, backend, padding):
    """What takes the place of the C++ kernel on a GPU."""
    if device == "cuda" and backend == "cpu":
        return "reference" if padding == "wrap" else "triton"
    return backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in SAMPLES])
def test_in_place(sample, dtype, backend, device):
    backend = on(device, backend, sample.kwargs.get("padding"))
    x, groups = sample.to(dtype, device).args
    want = i2v.token_shift(x, groups, **sample.kwargs, backend="reference")
    assert i2v.token_shift_(x, groups, **sample.kwargs, backend=backend) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", PADDINGS)
def test_any_frames_offset_and_stride(padding, backend, device):
    backend = on(device, backend, padding)
    torch.manual_seed(0)
    for frames, offset, step in itertools.product((1, 2, 6, 9), (-9, -4, -1, 1, 3, 2**40), (1, 2)):
        wide = torch.randn(7, 2, frames, 35, device=device)
        x = wide[..., 1:34].permute(1, 2, 0, 3)  # slices of [N, B, T, C]
        around = wide[..., 0].clone(), wide[..., 34].clone()
        groups, tokens = [(5, offset), (9, 0), (13, -offset)], (1, 6, step)
        want = i2v.token_shift(x, groups, padding=padding, tokens=tokens, backend="reference")
        i2v.token_shift_(x, groups, padding=padding, tokens=tokens, backend=backend)
        assert torch.equal(x, want)
        assert torch.equal(wide[..., 0], around[0]) and torch.equal(wide[..., 34], around[1])


def test_chooses_a_backend_and_writes_nothing_that_stays():
    x = torch.randn(2, 4, 5, 24)
    want = i2v.token_shift(x, [(6, -1), (6, 1)], tokens=(0, 1))
    still = x[:, :, 1:].clone()
    with torch.no_grad():
        i2v.token_shift_(x.requires_grad_(), [(6, -1), (6, 1)], tokens=(0, 1))
    assert torch.equal(x.detach(), want) and torch.equal(x[:, :, 1:].detach(), still)
    assert x._version == 1  # autograd sees that it was written


@pytest.mark.parametrize(
    ("x", "options", "exception", "text"),
    (
        (torch.randn(1, 2, 3, 8, requires_grad=True), {}, ValueError, "x.requires_grad=True"),
        (torch.randn(1, 1, 3, 8).expand(1, 4, 3, 8), {}, ValueError, "x.stride()=(24, 0, 8, 1) overlaps itself"),
        (torch.randn(100).as_strided((1, 4, 3, 8), (24, 2, 8, 1)), {}, ValueError, "overlaps itself"),
        (torch.randn(1, 2, 3), {}, ValueError, "x.shape=(1, 2, 3)"),
        (torch.randn(1, 2, 3, 8), {"padding": "zero"}, ValueError, "padding='zero'"),
        (torch.randn(1, 2, 3, 8), {"tokens": (0, 4)}, ValueError, "tokens[1]=4"),
        (torch.randn(1, 2, 3, 8), {"backend": "magic"}, ValueError, "backend='magic'"),
        (torch.randn(1, 2, 3, 8), {"backend": "cuda"}, NotImplementedError, "has no such backend"),
    ),
)
def test_refuses(x, options, exception, text):
    before = x.detach().clone()
    with pytest.raises(exception) as raised:
        i2v.token_shift_(x, [(2, 1)], **options)
    assert text in str(raised.value) and "token_shift_: " in str(raised.value)
    assert torch.equal(x.detach(), before)


def test_opcheck_and_compile():
    x = torch.randn(2, 4, 5, 24)
    arguments = (x, [6, 6], [-1, 1], "edge", 0, 5, 2, "")
    torch.library.opcheck(torch.ops.i2v_kernels.token_shift_.default, arguments, test_utils=["test_schema", "test_faketensor"])
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def step(x):
        y = x * 2
        i2v.token_shift_(y, [(6, -1), (6, 1)], padding="edge", tokens=(0, 5, 2))
        return y + 1

    with torch.no_grad():
        want = i2v.token_shift(x * 2, [(6, -1), (6, 1)], padding="edge", tokens=(0, 5, 2)) + 1
        torch.testing.assert_close(step(x), want)
