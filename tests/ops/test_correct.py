"""Every backend that runs here against the float64 definition: outputs, gradients, strides, edges, bad inputs, bits."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from i2v_kernels import _extension
from i2v_kernels.ops import base
from i2v_kernels.testing import OPINFOS, Sample

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTENSION, WHY_NOT = _extension.load()
ISAS = EXTENSION.build_info()["instruction_sets"] if EXTENSION else []
CALLS = [pytest.param(info, sample, id=f"{info}-{sample.name}") for info in OPINFOS for sample in info.samples()]
SHARES: list[tuple] = []  # (op, backend, dtype, sample, result, error / limit) of every comparison, for who asks
needs_extension = pytest.mark.skipif(EXTENSION is None, reason=str(WHY_NOT))


def telling(infos):
    """Calls that stand for the others where a test takes long."""
    return [
        pytest.param(info, sample, id=f"{info}-{sample.name}")
        for info in infos
        for i, sample in enumerate(info.samples())
        if i == 0 or sample.telling
    ]


def kernels(info):
    """The backend that CPUs are meant to run."""
    return base.OPS[info.name].first_choice("cpu")


@pytest.fixture
def isa(request):
    """The CPU kernels under one instruction set, for the length of a test."""
    EXTENSION.use_instruction_set(request.param)
    yield request.param
    EXTENSION.use_instruction_set(ISAS[-1])


def run(info, sample, backend):
    """Output and gradients of a call, for a random incoming gradient that depends on the shape alone."""
    out = info.op(*sample.args, **sample.kwargs, backend=backend)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out)
    return [out, *torch.autograd.grad(out, sample.tensors(), grad)]


def error(got, want, yardstick=False):
    """Relative error in the 2-norm over the entries that are finite; the others must agree in kind, except in a yardstick:
    with AMX, PyTorch's bfloat16 products carry a NaN into the products beside.
    """
    got = got.detach().double()
    assert yardstick or torch.equal(got.isnan(), want.isnan())
    assert yardstick or torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite() & (got.isfinite() if yardstick else True)
    return ((got - want)[finite].norm() / want[finite].norm().clamp_min(1e-30)).item()


@lru_cache(maxsize=1)  # the next test often judges the same call, by another instruction set or backend
def wanted(info, sample, dtype):
    """The call in that dtype, what it gives in float64, and what PyTorch eager makes of it in its dtype."""
    low = sample.to(dtype, requires_grad=True)
    return low, run(info, low.to(torch.float64, requires_grad=True), "reference"), run(info, low, "reference")


def compare(info, sample, dtype, backend, gradients=True):
    """The contract: at most 1.5 times the error of PyTorch eager in the same dtype."""
    low, exact, eager = wanted(info, sample, dtype)
    got = run(info, low, backend)
    for name, g, e, w in zip(["output", *(f"gradient {i}" for i in range(9))], got, eager, exact):
        assert g.dtype == e.dtype and g.shape == e.shape and g.stride() == e.stride(), name
        if name != "output" and not gradients:
            continue
        if info.exact and name == "output":
            assert torch.equal(g, e), name
        # float64 is the yardstick itself; half a unit in the last place is the rounding of the result
        slack = (64 if dtype == torch.float64 else 0.5) * torch.finfo(dtype).eps
        yard = error(e, w.detach(), yardstick=True)
        # more is no rounding: a yardstick that is wrong judges nothing
        assert yard < 64 * torch.finfo(dtype).eps or (info.picks and dtype.itemsize == 2), (name, yard)
        limit = 1.5 * yard + slack
        found = error(g, w.detach())
        SHARES.append((info.name, backend, str(dtype).removeprefix("torch."), sample.name, name, found / limit))
        assert found <= limit, (name, found, limit)


@needs_extension
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info, sample", CALLS)
def test_cpu(info, sample, dtype, isa):
    compare(info, sample, dtype, kernels(info))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("info, sample", CALLS)
def test_gradcheck(info, sample, backend):
    sample = sample.map(lambda x: x.contiguous() if 0 in x.stride() else x).to(requires_grad=True)  # as gradcheck needs them
    if any(not (t.abs() < 16).all() for t in sample.tensors()):
        pytest.skip("finite differences need finite, tame numbers")

    def call(*tensors):
        return info.op(*sample.args, **sample.kwargs, backend=kernels(info) if backend == "cpu" else backend)

    assert torch.autograd.gradcheck(call, sample.tensors(), atol=1e-7, fast_mode=True)


BAD = [pytest.param(info.op, *rest, id=f"{info}-{why}") for info in OPINFOS for why, *rest in info.bad()]


@pytest.mark.parametrize("op, args, kwargs, exception, text", BAD)
def test_bad_input(op, args, kwargs, exception, text):
    with pytest.raises(exception) as raised:
        op(*args, **kwargs)
    assert text in str(raised.value)
    assert op.__name__ in str(raised.value)


@needs_extension
@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_same_bits_for_any_number_of_threads(info):
    """How PyTorch's matrix products are divided is for MKL to choose: the formula tells whether it does so by threads."""
    sample = info.models(1)[-1].to(torch.float32, requires_grad=True)
    threads = torch.get_num_threads()

    def same(backend):
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run(info, sample, backend))
        return all(torch.equal(a, b) for a, b in zip(*found))

    try:
        assert same(kernels(info)) or (info.products and not same("reference"))
    finally:
        torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_larger_than_the_cache(info, dtype):
    """Calls of this size are written around the cache. Among so many some are equal but for rounding, even in float32."""
    compare(info, info.models(4)[0], dtype, kernels(info), gradients=not info.picks)


@needs_extension
@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_more_rows_than_other_kernels_can_count(info):
    """65,535 is where libraries that count batches in the second grid dimension stop."""
    sample = info.samples()[0].to(torch.float32)
    for dim, count in ((info.rows[0], 1), (info.rows[-1], 70_000)):
        sample = info.repeated(sample, dim, count)
    axis = info.axis(dim)
    out = info.op(*sample.args, **sample.kwargs, backend=kernels(info)).narrow(axis, 1, count - 1)  # the first: a class token
    assert torch.equal(out, out.narrow(axis, 0, 1).expand_as(out)) and out.isfinite().all()


@needs_extension
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
def test_token_shift_around_the_cache(padding, residual):
    """Sizes that end within a vector and a block of tokens; some tokens stay."""
    info = next(info for info in OPINFOS if info.name == "token_shift")
    call = (torch.randn(2, 5, 37, 12_345), [(97, -1), (96, 1), (33, 3)])
    kwargs = {"padding": padding, "tokens": (1, 30, 2), "residual": residual}
    compare(info, Sample("", call, kwargs), torch.float32, "cpu")


@needs_extension
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("count", [3, 9], ids=["in the cache", "around it"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "edge", "wrap"])
def test_token_shift_of_long_rows(padding, residual, count, isa):
    """As TSM shifts planes: they are cut, at places that no vector divides; some tokens stay."""
    info = next(info for info in OPINFOS if info.name == "token_shift")
    call = (torch.randn(2, 5, count, 50_003), [(12_345, -1), (0, 2), (9_001, 1), (20_000, 3)])
    kwargs = {"padding": padding, "tokens": (1, count - 1, 2), "residual": residual}
    compare(info, Sample("", call, kwargs), torch.float32, "cpu")


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
@pytest.mark.parametrize("kernel", [(3, 1, 1), (9, 1, 1), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("empty", range(4), ids=["clips", "frames", "tokens", "channels"])
def test_temporal_conv_of_nothing(empty, kernel, backend):
    sizes = [2, 3, 20, 16]
    sizes[empty] = 0
    x, grid = torch.randn(sizes, requires_grad=True), (sizes[2] // 5, 5)
    weight = torch.randn(sizes[3], 1, *kernel, requires_grad=True)
    info = next(info for info in OPINFOS if info.name == "temporal_conv")
    out = info.op(x, weight, grid=grid, prefix=0, backend=backend)
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == dx.shape == x.shape and dweight.shape == weight.shape and not dweight.any()
