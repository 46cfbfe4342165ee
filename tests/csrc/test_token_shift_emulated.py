"""What one thread of token_shift's CUDA kernel computes, over the whole grid, against the definition.

Run on the CPU by the kernel's emulation, and by the kernel itself where there is a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from i2v_kernels import _extension
from i2v_kernels.ops.token_shift import reference
from i2v_kernels.ops.token_shift.op import MAX_GROUPS, PADDINGS

pytestmark = pytest.mark.skipif(_extension.why_no_cpu() is not None, reason=str(_extension.why_no_cpu()))

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and _extension.why_no_cuda() is not None:
        pytest.skip(str(_extension.why_no_cuda()))
    return request.param


def launch(x, *arguments):
    torch.ops.i2v_kernels_C.token_shift(x, *arguments)


def vector_bytes(x, out, channels):
    return torch.ops.i2v_kernels_C.token_shift_vector_bytes(x, out, channels)


def guarded(shape, dtype, device, order=(0, 1, 2, 3), shift=0, pad=0):
    """A NaN-filled tensor whose dimensions lie in `order` in memory, and its storage: what stays NaN was not written.

    It begins `shift` elements into the storage and leaves `pad` elements unused after each row.
    """
    sizes = [shape[i] for i in order]
    row = sizes[-1] + pad
    count = row * max(sizes[0] * sizes[1] * sizes[2], 1)
    storage = torch.full((shift + count,), float("nan"), dtype=dtype, device=device)
    strides = [0] * 4
    step = 1
    for place in (3, 2, 1, 0):
        strides[order[place]] = step
        step *= row if place == 3 else sizes[place]
    return storage.as_strided(shape, strides, shift), storage


def check(x, out, storage, groups, padding, tokens, residual, adjoint):
    channels, offsets = [g[0] for g in groups], [g[1] for g in groups]
    definition = reference.adjoint if adjoint else reference.forward
    wanted = definition(x.double(), channels, offsets, padding, *tokens, residual)
    launch(x, out, channels, offsets, PADDINGS.index(padding), *tokens, residual, adjoint)
    if residual or (adjoint and padding == "edge"):
        torch.testing.assert_close(out.double(), wanted, rtol=EPS[x.dtype], atol=EPS[x.dtype])
    else:
        assert torch.equal(out.double(), wanted)
    assert int(storage.isnan().sum()) == storage.numel() - out.numel(), "memory beside the output was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adjoint", (False, True), ids=("forward", "adjoint"))
@pytest.mark.parametrize("residual", (False, True), ids=("copies", "residual"))
@pytest.mark.parametrize("padding", PADDINGS)
def test_matches_the_definition(padding, residual, adjoint, dtype, device):
    torch.manual_seed(0)
    groupings = (
        [(16, 1), (16, -1)],
        [(8, -2), (0, 5), (1, 1), (31, 40)],
        [(3, -(2**62)), (2, 2**62), (4, 7)],
        [(8, i - 4) for i in range(MAX_GROUPS)],
        [],
    )
    ranges = ((0, 5, 1), (1, 4, 1), (2, 2, 1), (0, 5, 2), (1, 5, 9))
    for groups, frames, tokens in itertools.product(groupings, (1, 2, 3, 4, 5, 8, 13), ranges):
        shape = (2, frames, 5, 64)
        x = torch.randn(shape, dtype=dtype, device=device)
        check(x, *guarded(shape, dtype, device), groups, padding, tokens, residual, adjoint)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adjoint", (False, True), ids=("forward", "adjoint"))
@pytest.mark.parametrize("residual", (False, True), ids=("copies", "residual"))
def test_any_strides_and_addresses(residual, adjoint, dtype, device):
    torch.manual_seed(1)
    widths = set()
    orders = ((0, 1, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3), (1, 2, 0, 3))
    for order, shift, pad, channels in itertools.product(orders, (0, 1, 2, 4, 8), (0, 1, 2, 4, 8), (1, 2, 7, 24, 64)):
        shape = (2, 5, 3, channels)
        x, storage = guarded(shape, dtype, device, order, shift, pad)
        x.copy_(torch.randn(shape))
        groups = [(channels // 4, 1), (channels // 4, -1)]
        out, storage = guarded(shape, dtype, device, orders[(orders.index(order) + shift) % 4], pad, shift)
        check(x, out, storage, groups, "edge", (0, 3, 1), residual, adjoint)
        widths.add(vector_bytes(x, out, [g[0] for g in groups]))
    assert widths == {width for width in (2, 4, 8, 16) if width >= dtype.itemsize}


@pytest.mark.parametrize("shape", ((0, 4, 3, 8), (2, 0, 3, 8), (2, 4, 0, 8), (2, 4, 3, 0)))
def test_empty(shape, device):
    x = torch.randn(shape, device=device)
    for padding, residual, adjoint in itertools.product(range(3), (False, True), (False, True)):
        launch(x, torch.empty_like(x), [], [], padding, 0, shape[2], 1, residual, adjoint)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_models_get_the_widest_vectors(dtype):
    """TSM and TokShift on ViT-B and ViT-L, batch-first and sequence-first."""
    for width, fraction in itertools.product((768, 1024), (4, 8, 32)):
        dense = torch.empty(2, 8, 197, width, dtype=dtype)
        sequence_first = torch.empty(197, 2, 8, width, dtype=dtype).permute(1, 2, 0, 3)
        for x in (dense, sequence_first):
            assert vector_bytes(x, x, [width // fraction] * 2) == 16


def test_narrower_where_a_boundary_asks_for_it():
    x = torch.empty(1, 2, 3, 64, dtype=torch.bfloat16)
    assert [vector_bytes(x, x, [count]) for count in (8, 4, 2, 1)] == [16, 8, 4, 2]
    assert vector_bytes(x[..., :63], x[..., :63], []) == 2
    assert vector_bytes(x[..., 4:60], x[..., :56], []) == 8
    assert vector_bytes(x[:1, :1, :1, 8:9], x[:1, :1, :1, :1], []) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (([5, 5], [1, 1], 0, 0, 3, 1), "name 10 of 8 channels"),
        (([1] * 9, [1] * 9, 0, 0, 3, 1), "at most 8"),
        (([1], [1, 2], 0, 0, 3, 1), "as many offsets"),
        (([1], [1], 3, 0, 3, 1), "padding 3 is unknown"),
        (([1], [1], 0, 0, 3, 0), "step 0"),
    ),
)
def test_refuses(arguments, message, device):
    x = torch.randn(1, 2, 3, 8, device=device)
    with pytest.raises(RuntimeError, match=message):
        launch(x, torch.empty_like(x), *arguments, False, False)
