"""Every GPU backend of every op on a real card, against the float64 definition on that card (proof step 7)."""

from __future__ import annotations

import card
import pytest
import torch
from card import DEVICE
from test_correct import compare, error, run

import i2v_kernels as i2v
from i2v_kernels.ops import base
from i2v_kernels.testing import OPINFOS

pytestmark = pytest.mark.gpu

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KERNELS = [(info, b.name) for info in OPINFOS for b in base.OPS[info.name].backends if b.name in ("library", "triton", "cuda")]
EACH = pytest.mark.parametrize("info, backend", [pytest.param(*k, id=f"{k[0]}-{k[1]}") for k in KERNELS])
CALLS = [
    pytest.param(info, sample, backend, id=f"{info}-{backend}-{sample.name}")
    for info, backend in KERNELS
    for sample in info.samples()
]


def needs(info, sample, backend):
    """Skips with the backend's own reason."""
    reason = i2v.explain(info.op, *sample.args, **sample.kwargs).reasons[backend]
    if reason.startswith("cannot"):
        pytest.skip(reason)


def ordinary(info, dtype=torch.bfloat16, **changes):
    return info.samples()[0].to(dtype, DEVICE, **changes)


def repeated(info, dim, count, dtype):
    """The op's first sample with one of its tokens, or clips, written ``count`` times."""
    return info.repeated(info.samples()[0].to(dtype, DEVICE), dim, count).map(torch.Tensor.contiguous)


def check_all_alike(info, sample, backend, dim):
    """Where clips (or tokens) are alike, so are their outputs and gradients; of a library's products but for rounding."""
    same = torch.equal if backend != "library" else lambda a, b: torch.allclose(a, b, rtol=2**-6, atol=2**-10)
    places = {i: axis for i, axis in info.axes(dim).items() if sample.args[i].is_floating_point()}
    leaves = [sample.args[i].requires_grad_() for i in places]
    out = info.op(*sample.args, **sample.kwargs, backend=backend)
    grads = torch.autograd.grad(out, leaves, out.detach()) if leaves else ()
    for result, axis in zip((out.detach(), *grads), (info.axis(dim), *places.values())):
        one = result.narrow(axis, 0, 1)
        assert one.isfinite().all()
        step = max(2**27 // one.numel(), 1)  # comparing all at once would need as much memory again
        assert all(same(part, one.expand_as(part)) for part in result.split(step, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info, sample, backend", CALLS)
def test_matches_the_definition(info, sample, backend, dtype):
    low = sample.to(dtype, DEVICE)
    needs(info, low, backend)
    compare(info, low, dtype, backend)


@pytest.mark.parametrize("place", (0, -1), ids=("clips", "tokens"))
@EACH
def test_more_than_65535_rows(info, backend, place):
    """Where kernels that count rows in the second grid dimension stop: 65,535."""
    dim = info.rows[place]
    sample = repeated(info, dim, card.ROWS, torch.bfloat16)
    needs(info, sample, backend)
    check_all_alike(info, sample, backend, dim)


@EACH
def test_more_elements_than_32_bits_count(info, backend):
    dim, first = info.rows[0], info.samples()[0]
    which, axis = next(iter(info.axes(dim).items()))
    per_clip = first.args[which].narrow(axis, 0, 1).numel()
    clips = card.ELEMENTS // per_clip + 1
    wanted = (2 * len(info.axes(dim)) + 2) * 2 * clips * per_clip  # with gradients, output and one to spare, in bytes
    free = card.free_memory()
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    sample = repeated(info, dim, clips, torch.bfloat16)
    needs(info, sample, backend)
    check_all_alike(info, sample, backend, dim)


@EACH
def test_same_bits_every_time(info, backend):
    sample = card.model_call(info).to(torch.bfloat16, DEVICE, requires_grad=True)
    needs(info, sample, backend)
    first = run(info, sample, backend)
    for _ in range(card.REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, run(info, sample, backend)))


@EACH
def test_cuda_graph(info, backend):
    sample = ordinary(info, requires_grad=True)
    needs(info, sample, backend)
    grad = torch.randn_like(run(info, sample, backend)[0])

    def step():
        out = info.op(*sample.args, **sample.kwargs, backend=backend)
        return [out, *torch.autograd.grad(out, sample.tensors(), grad)]

    replay, results = card.captured(step)
    for _ in range(min(card.REPEATS, 3)):
        with torch.no_grad():
            for value in (*sample.tensors(), grad):
                value.copy_(torch.randn_like(value))
        replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step()))


@EACH
def test_runs_on_the_current_stream(info, backend):
    """The input is written late, on the same stream: a launch on another stream would read what was there before."""
    sample = ordinary(info, requires_grad=True)
    needs(info, sample, backend)
    wanted = run(info, sample, backend)
    values = [t.detach().clone() for t in sample.tensors()]
    with torch.no_grad():
        for t in sample.tensors():
            t.zero_()
    card.synchronize()
    with card.other_stream():
        card.keep_busy()
        with torch.no_grad():
            for t, value in zip(sample.tensors(), values):
                t.copy_(value)
        got = run(info, sample, backend)
    card.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@EACH
def test_runs_on_the_device_of_its_tensors(info, backend):
    if card.count() < 2:
        pytest.skip("needs two GPUs")
    sample = info.samples()[0].to(torch.bfloat16, "cuda:1", requires_grad=True)
    needs(info, sample, backend)
    got = run(info, sample, backend)
    wanted = run(info, ordinary(info, requires_grad=True), backend)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@EACH
def test_autocast(info, backend, dtype):
    sample = ordinary(info, torch.float32, requires_grad=True)
    with torch.autocast(DEVICE, dtype):
        needs(info, sample, backend)
    exact = run(info, sample.to(requires_grad=True), "reference")
    with torch.autocast(DEVICE, dtype):
        eager, got = run(info, sample, "reference"), run(info, sample, backend)
    for g, e, w in zip(got, eager, exact):
        assert g.dtype == e.dtype
        assert error(g, w.detach()) <= 1.5 * error(e, w.detach()) + 0.5 * torch.finfo(e.dtype).eps


@EACH
def test_opcheck_and_compile(info, backend):
    sample = ordinary(info, requires_grad=True)
    needs(info, sample, backend)
    wanted = run(info, sample, backend)
    compiled = torch.compile(info.op, fullgraph=True)
    out = compiled(*sample.args, **sample.kwargs, backend=backend)
    assert torch.equal(out, wanted[0])
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(out)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, sample.tensors(), grad), wanted[1:]))
    op = base.OPS[info.name]
    calls: list[tuple] = []
    with op.recording(calls):
        info.op(*sample.args, **sample.kwargs, backend=backend)
    torch.library.opcheck(op.forward_op, calls[0])


@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_automatic_choice(info):
    sample = ordinary(info)
    assert i2v.explain(info.op, *sample.args, **sample.kwargs).backend in (
        "library",
        *(("cpu", "sdpa") if card.STUB else ("triton", "cuda")),
    )


@pytest.mark.parametrize("info", OPINFOS, ids=str)
def test_tensors_on_two_devices_are_refused(info):
    sample, away = ordinary(info), "meta" if card.STUB else "cpu"
    for i, value in enumerate(sample.args):
        if i and isinstance(value, torch.Tensor):
            args = (*sample.args[:i], value.to(away), *sample.args[i + 1 :])
            with pytest.raises(ValueError, match=f"is on {away}"):
                info.op(*args, **sample.kwargs)
