"""``token_shift_`` against ``token_shift``: values, memory that must stay, what autograd hears of it, what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

import i2v_kernels as i2v
from i2v_kernels import _extension
from i2v_kernels.testing.opinfo import randn, sequence_first

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
needs_extension = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))
each_backend = pytest.mark.parametrize(
    "backend, device",
    [
        ("reference", "cpu"),
        pytest.param("cpu", "cpu", marks=needs_extension),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
TSM = [(6, -1), (6, 1)]
CALLS = {
    "tsm": (TSM, {}),
    "class token": (TSM, {"tokens": (0, 1)}),
    "every third token": (TSM, {"tokens": (1, 7, 3)}),
    "a step beyond the tokens": (TSM, {"tokens": (2, 7, 2**62)}),
    "no tokens": (TSM, {"tokens": (2, 2)}),
    "all channels": ([(12, 3), (12, -3)], {}),
    "odd groups, far": ([(5, 2), (1, -3), (0, 4), (7, 9), (3, 0), (8, -9)], {}),
    "no groups": ([], {}),
}


def same_bits_as_out_of_place(call, padding, dtype, backend, device="cpu"):
    groups, options = CALLS[call]
    for frames, layout in itertools.product((1, 2, 6, 8), (torch.clone, sequence_first)):
        x = layout(randn(2, frames, 7, 24))
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
        want = i2v.token_shift(x, groups, padding=padding, **options, backend="reference")
        out = i2v.token_shift_(x, groups, padding=padding, **options, backend=backend)
        assert out is x and torch.equal(x, want)


def writes_nothing_else(backend, device="cpu"):
    buffer = randn(2, 5, 9, 40).to(device, torch.float32)
    buffer[..., 22:] = float("nan")
    want = buffer.clone()
    i2v.token_shift_(buffer[:, :, 1:8, 8:], [(7, 1), (7, -1)], padding="edge", tokens=(2, 7, 2), backend=backend)
    want[:, :, 3:8:2, 8:] = i2v.token_shift(want[:, :, 3:8:2, 8:], [(7, 1), (7, -1)], padding="edge", backend="reference")
    assert torch.equal(buffer.nan_to_num(7), want.nan_to_num(7))


def takes_what_is_empty(backend, device="cpu"):
    for shape in ((0, 4, 3, 8), (2, 0, 3, 8), (2, 4, 0, 8), (2, 4, 3, 0)):
        for padding in ("zeros", "edge", "wrap"):
            i2v.token_shift_(torch.randn(shape, device=device), [(min(2, shape[3]), 1)], padding=padding, backend=backend)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
@pytest.mark.parametrize("call", CALLS)
def test_same_bits_as_out_of_place(call, padding, dtype, backend, device):
    same_bits_as_out_of_place(call, padding, dtype, backend, device)


@each_backend
def test_writes_nothing_else(backend, device):
    """Of a larger buffer; NaN beside the shifted channels stays where it is and reaches no other."""
    writes_nothing_else(backend, device)


@each_backend
def test_empty(backend, device):
    takes_what_is_empty(backend, device)


@needs_extension
@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
def test_on_several_threads(padding):
    """More work than one thread takes; rows wider than what the rotation of "wrap" holds aside; blocks of tokens."""
    x = randn(2, 6, 37, 1100).float()
    want = i2v.token_shift(x, [(1000, 4), (97, -1)], padding=padding, tokens=(1, 36, 2), backend="reference")
    assert torch.equal(i2v.token_shift_(x, [(1000, 4), (97, -1)], padding=padding, tokens=(1, 36, 2), backend="cpu"), want)


@each_backend
def test_autograd_is_told(backend, device):
    """A tensor that a backward pass needs may not change unnoticed, in inference mode neither."""
    leaf = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    for guard in (torch.no_grad, torch.inference_mode):
        for shift in (
            lambda y: i2v.token_shift_(y, [(2, 1)], backend=backend),
            lambda y: torch.ops.i2v_kernels.token_shift_(y, [2], [1], "zeros", 0, 2, 1, backend),
        ):
            y = leaf.exp()
            with guard():
                shift(y)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
    with torch.inference_mode():
        i2v.token_shift_(torch.randn(1, 3, 2, 4, device=device), [(2, 1)], backend=backend)


@each_backend
def test_refuses_to_be_recorded(backend, device):
    x = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    for y in (x, x * 2):
        with pytest.raises(ValueError, match=r"token_shift_: x\.requires_grad=True"):
            i2v.token_shift_(y, [(2, 1)], backend=backend)
        with pytest.raises(ValueError, match=r"token_shift_: x\.requires_grad=True"):
            torch.ops.i2v_kernels.token_shift_(y, [2], [1], "zeros", 0, 2, 1, backend)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 4, 5, 24).expand(2, 4, 5, 24),
        torch.zeros(2, 4, 1, 24).expand(2, 4, 5, 24),
        torch.zeros(9, 5, 24).unfold(0, 4, 2).permute(0, 3, 1, 2),  # clips that share frames
    ],
    ids=["clips", "tokens", "sliding windows"],
)
def test_refuses_shared_memory(x):
    with pytest.raises(ValueError, match=r"token_shift_: x\.stride\(\)=.*share memory"):
        i2v.token_shift_(x, TSM)


def test_takes_any_memory_of_its_own():
    clip = torch.zeros(4, 5, 24)
    for x in (clip.expand(1, -1, -1, -1), clip[None, ::2, 1:], clip.permute(1, 0, 2)[None], clip[None, ..., :1]):
        i2v.token_shift_(x, [(1, 1)])


@pytest.mark.parametrize(
    ("groups", "options", "exception", "text"),
    [
        ([(20, 1), (5, 1)], {}, ValueError, "name 25 channels"),
        ([(3, 1)], {"padding": "zero"}, ValueError, "padding='zero'"),
        ([(3, 1)], {"tokens": (0, 6)}, ValueError, "tokens[1]=6"),
        ([(3, 1)], {"tokens": (0, 5, 0)}, ValueError, "tokens[2]=0"),
        ([(3, 1)], {"backend": "cuda"}, NotImplementedError, "no such backend"),
    ],
)
def test_bad_input(groups, options, exception, text):
    with pytest.raises(exception) as raised:
        i2v.token_shift_(torch.randn(2, 4, 5, 24), groups, **options)
    assert text in str(raised.value) and "token_shift_:" in str(raised.value)


@needs_extension
def test_a_direct_call_stays_within_its_tensor():
    x = torch.randn(1, 3, 2, 4)
    op = torch.ops.i2v_kernels.token_shift_
    for channels, *tokens in ((5, 0, 2, 1), (2, 0, 3, 1), (2, 0, 2, 0), (2, -1, 2, 1)):
        with pytest.raises(RuntimeError, match="token_shift"):
            op(x, [channels], [1], "zeros", *tokens, "cpu")


def test_opcheck():
    for padding in ("zeros", "edge", "wrap"):
        call = (torch.randn(2, 4, 5, 24), [6, 6], [-1, 1], padding, 1, 5, 2, "")
        torch.library.opcheck(torch.ops.i2v_kernels.token_shift_.default, call)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic):
    """Of an argument, which changes, and of what the function made itself; any layout."""
    torch._dynamo.reset()

    def step(x):
        own = x * 2
        i2v.token_shift_(own, TSM, tokens=(0, 1))
        return own + i2v.token_shift_(x, TSM, padding="edge")

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for clips, layout in ((2, torch.clone), (3, torch.clone), (2, sequence_first)):
        x = layout(randn(clips, 4, 5, 24)).float()
        y = x.clone()
        with torch.no_grad():
            assert torch.equal(compiled(x), step(y)) and torch.equal(x, y)


def test_explain():
    explained = i2v.explain(i2v.token_shift_, torch.randn(1, 3, 2, 4), [(2, 1)])
    assert explained.backend in ("cpu", "reference") and explained.reasons["cuda"].startswith("cannot: ")
