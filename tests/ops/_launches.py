"""Launches that are planned once, with Triton's own Python and a driver that records; test_launches.py runs this file."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from bench.host import BATCHES, prepare

STUB = prepare()  # before i2v_kernels is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from i2v_kernels.ops import triton_launch  # noqa: E402
from i2v_kernels.ops.base import OPS  # noqa: E402
from i2v_kernels.ops.triton_common import Launch  # noqa: E402
from i2v_kernels.ops.triton_launch import PLANNED, Place, run  # noqa: E402
from i2v_kernels.testing import OPINFOS, Sample  # noqa: E402

INFOS = [info for info in OPINFOS if "triton" in OPS[info.name]._by_name]
CALLS = [pytest.param(info, i, id=f"{info}-{sample.name}") for info in INFOS for i, sample in enumerate(info.samples())]
FIXED = 9  # what the launcher takes before the kernel's arguments: grid, stream, function, metadata, hooks


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["step"])
def sized_kernel(x, y, size, count, step, scale, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(y + o_n * step, tl.load(x + o_n, mask=o_n < size) * scale, mask=o_n < count)


def plan_sized(x, y, size, count, step=32):
    return Launch(sized_kernel, 7, {"x": x, "y": y, "size": size, "count": count, "step": step, "scale": 0.5}, {"BN": 64})


@pytest.fixture(autouse=True)
def _fresh():
    PLANNED.clear()
    STUB.launched.clear()
    STUB.keep = True
    yield
    STUB.keep = False


def launched():
    """What was launched since this was asked last: ``[(head, arguments)]``."""
    found = [(args[:FIXED], args[FIXED:]) for args in STUB.launched]
    STUB.launched.clear()
    return found


def call(info, sample):
    """Forward and backward."""
    out = info.op(*sample.args, **sample.kwargs)
    if out.numel():
        torch.autograd.grad(out, sample.tensors(), torch.ones_like(out), allow_unused=True)


def test_this_triton_is_called_directly():
    """Else every launch takes Triton's way, and nothing says so but a bench."""
    assert triton_launch.FAST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("info, i", CALLS)
def test_a_repeated_launch_has_the_same_arguments(info, i, dtype, monkeypatch):
    """The same as Triton's own way gives them, pointers for tensors."""
    sample = info.samples()[i].to(dtype, requires_grad=True)
    places = {x.data_ptr() for x in sample.inputs()}
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "FAST", False)
        call(info, sample)
    first, compiled = launched(), len(STUB.compiled)
    call(info, sample)
    launched()
    call(info, sample)
    again = launched()
    assert len(STUB.compiled) == compiled and len(first) == len(again)
    assert all(known.steps is not None for known in PLANNED.values())
    for (head, values), (head_again, values_again) in zip(first, again):
        assert head[:6] == head_again[:6] and len(values) == len(values_again)
        for value, other in zip(values, values_again):
            if isinstance(value, torch.Tensor):
                assert type(other) is int and other % 16 == value.data_ptr() % 16
                assert other == value.data_ptr() or value.data_ptr() not in places
            else:
                assert type(value) is type(other) and value == other
    nothing = any(not x.numel() for x in sample.inputs())
    assert again or nothing or info.products  # bottleneck_adapter's float32, and what is wide, is PyTorch's


@pytest.mark.parametrize("info, i", CALLS)
def test_ahead_of_time_compiles_what_a_launch_does(info, i, monkeypatch):
    """``Launch.specialised`` against what Triton derives."""
    asked = []
    for kernel in {launch.kernel for launch in planned(info, i)}:
        kernel.device_caches.clear()
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", spied(asked))
    PLANNED.clear()
    call(info, info.samples()[i].to(torch.bfloat16, requires_grad=True))
    launches = [launch for known in PLANNED.values() for launch in known.launches]
    found = {derived(launch.kernel, *like_triton(launch)) for launch in launches}
    assert found == {derived(*each) for each in asked}


def planned(info, i):
    call(info, info.samples()[i].to(torch.bfloat16, requires_grad=True))
    return [launch for known in PLANNED.values() for launch in known.launches]


def spied(asked):
    compiled = triton.runtime.jit.JITFunction._do_compile

    def spy(kernel, key, signature, device, constexprs, options, attrs, warmup):
        names = kernel.arg_names
        constants = {names[i]: value for (i,), value in constexprs.items()}
        divisible = {names[i] for (i,), value in attrs.items() if value}
        asked.append((kernel, signature, constants, divisible))
        return compiled(kernel, key, signature, device, constexprs, options, attrs, warmup)

    return spy


def like_triton(launch):
    args = {
        name: torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta") if isinstance(x, Place) else x
        for name, x in launch.args.items()
    }
    return Launch(launch.kernel, launch.programs, args, launch.constexprs).specialised()


def derived(kernel, signature, constants, divisible):
    """Comparable; whether pointers are aligned is for each call to say."""
    aligned = frozenset(name for name in divisible if not signature[name].startswith("*"))
    return kernel.__name__, frozenset(signature.items()), frozenset(constants.items()), aligned


def test_do_not_specialize(monkeypatch):
    asked = []
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", spied(asked))
    x = torch.empty(64)
    for size, count, step in ((16, 16, 16), (1, 1, 1)):
        y = torch.empty(64 * step)
        run(plan_sized, (x, y), (size, count, step))
        kernel, signature, constants, divisible = asked[-1]
        ours = plan_sized(x, y, size, count, step).specialised()
        assert derived(kernel, signature, constants, divisible) == derived(kernel, *ours)
        assert signature["count"] == "i32" and "count" not in divisible and "count" not in ours[1]
        assert "step" not in divisible
    launched()
    before = len(asked)
    for count in (2, 3, 16, 64):
        run(plan_sized, (x, y), (1, count, 1))
    assert len(asked) == before and [values[3] for _, values in launched()] == [2, 3, 16, 64]


@pytest.mark.parametrize("name", [info.name for info in INFOS])
def test_a_ragged_batch_compiles_nothing(name):
    """Nor does one clip alone.

    Where clips are not outermost in memory, strides say how many there are. They are multiples of the channels, so with a
    multiple of 16 of these, as models have, it is the same kernel still; these samples have other numbers.
    """
    info = next(info for info in INFOS if info.name == name)
    for i, sample in enumerate(info.samples()):
        x = sample.args[0]
        if x.dim() > 1 and x.shape[0] > 1 and x.numel() and x.stride(0) == max(x.stride()):
            call(info, batch(info, i, 64))
            compiled = len(STUB.compiled)
            for clips in (*BATCHES, 1):
                call(info, batch(info, i, clips))
            assert STUB.compiled[compiled:] == [], sample.name


def batch(info, i, clips):
    """The sample with so many clips."""
    sample = info.samples()[i].to(torch.bfloat16)
    size = sample.args[0].shape[0]

    def resized(x):
        """In the same order of dimensions, dense."""
        if isinstance(x, tuple):
            return tuple(map(resized, x))
        if not isinstance(x, torch.Tensor) or x.dim() < 2 or x.shape[0] != size or x is sample.kwargs.get("bias"):
            return x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        order = sorted(range(x.dim()), key=lambda d: -x.stride(d) or -math.inf)  # what is expanded: outermost
        shape = (clips, *x.shape[1:])
        new = torch.zeros([shape[d] for d in order], dtype=x.dtype).permute([order.index(d) for d in range(x.dim())])
        return new.requires_grad_() if x.is_floating_point() else new

    tensors = tuple(map(resized, sample.args))
    return Sample(sample.name, tensors, {key: resized(value) for key, value in sample.kwargs.items()})


def test_what_makes_a_launch_another():
    x, y = torch.empty(130), torch.empty(130)
    run(plan_sized, (x[:64], y[:64]), (64, 64))
    compiled, kinds = len(STUB.compiled), len(PLANNED)
    run(plan_sized, (x[4:68], y[64:128]), (64, 64))  # other places, as aligned
    assert len(PLANNED) == kinds and len(STUB.compiled) == compiled
    run(plan_sized, (x[1:65], y[:64]), (64, 64))  # less aligned
    assert len(PLANNED) == kinds + 1 and len(STUB.compiled) == compiled + 1
    for other in (x[:128:2], x[:32], x.half()[:64]):
        run(plan_sized, (other, y[:64]), (64, 64))
    assert len(PLANNED) == kinds + 4
    run(plan_sized, (x[:64], y[:64]), (64, 63))
    assert len(PLANNED) == kinds + 5
    pointers = [[x if type(x) is int else x.data_ptr() for x in values[:2]] for _, values in launched()]
    assert pointers[1] == [x[4:].data_ptr(), y[64:].data_ptr()]


def test_tensors_that_are_one_at_first_and_two_later():
    x, y = torch.empty(64), torch.empty(64)
    run(plan_sized, (x, x), (64, 64))
    run(plan_sized, (x, y), (64, 64))
    run(plan_sized, (y, x), (64, 64))
    assert [values[:2] for _, values in launched()][1:] == [(x.data_ptr(), y.data_ptr()), (y.data_ptr(), x.data_ptr())]


def plan_memory(x, *options):
    parts = torch.empty(2, 8)
    lse = torch.empty(2, 5, 64)
    return [plan_sized(x, parts, 1, 1), plan_sized(lse[1], parts, 1, 1), plan_sized(lse[0], parts, 1, 1)], parts, None


def test_memory_that_a_plan_makes_is_made_anew():
    x = torch.empty(64)
    kept = [run(plan_memory, (x,), ()) for _ in range(3)]
    for parts, nothing in kept:
        assert nothing is None and parts.shape == (2, 8) and parts.isnan().all()
    assert len({parts.data_ptr() for parts, _ in kept}) == 3
    (_, a), (_, b), (_, c) = launched()[-3:]
    assert a[1] == b[1] == c[1] == kept[2][0].data_ptr() and b[0] - c[0] == 5 * 64 * 4


def test_a_plan_does_not_compute():
    def plan(x):
        return plan_sized(x, x.t().contiguous(), 1, 1)

    with pytest.raises(ValueError, match="computes a tensor"):
        run(plan, (torch.empty(2, 3),), ())


def test_nothing_is_kept_alive():
    x, y = torch.empty(64), torch.empty(64)
    for _ in range(2):
        run(plan_sized, (x, y), (64, 64))
    watch = weakref.ref(x)
    STUB.launched.clear()
    del x
    gc.collect()
    assert watch() is None


def test_bounded(monkeypatch):
    monkeypatch.setattr(triton_launch, "LARGEST", 3)
    x = torch.empty(64)
    for size in range(2, 20):
        run(plan_sized, (x, x), (size, 64))
        assert len(PLANNED) <= 3
    assert [values[2] for _, values in launched()] == list(range(2, 20))


def test_hooks_see_launches():
    """As those of a profiler; without one they cost nothing."""
    x = torch.empty(64)
    for _ in range(2):
        run(plan_sized, (x, x), (64, 64))
    assert launched()[-1][0][6:9] == (None, None, None)
    runtime = triton.knobs.runtime

    def hook(about):
        raise AssertionError("launchers call hooks, not we")

    runtime.launch_enter_hook.add(hook)
    try:
        run(plan_sized, (x, x), (64, 64))
    finally:
        runtime.launch_enter_hook.remove(hook)
    about, enter, leave = launched()[-1][0][6:9]
    assert about.get()["name"] == "sized_kernel" and enter is runtime.launch_enter_hook and leave is runtime.launch_exit_hook


def test_modes_of_triton_are_heeded():
    x, runtime = torch.empty(64), triton.knobs.runtime
    for _ in range(2):
        run(plan_sized, (x, x), (64, 64))
    compiled = len(STUB.compiled)
    runtime.debug = True
    try:
        run(plan_sized, (x, x), (64, 64))
        assert len(STUB.compiled) == compiled + 1
    finally:
        runtime.debug = False
    launched()
    run(plan_sized, (x, x), (64, 64))
    assert len(STUB.compiled) == compiled + 1 and type(launched()[0][1][0]) is int


def test_without_the_direct_way(monkeypatch):
    """In a Triton that calls its kernels otherwise, nothing is derived again all the same."""
    monkeypatch.setattr(triton_launch, "FAST", False)
    x, y = torch.empty(64), torch.empty(64)
    run(plan_sized, (x, x), (64, 64))
    run(plan_sized, (x, y), (64, 64))
    (_, first), (_, second) = launched()
    assert [t.data_ptr() for t in (*first[:2], *second[:2])] == [t.data_ptr() for t in (x, x, x, y)]


def test_float32_products_follow_the_setting():
    """As the setting changes, so does the launch."""
    x, matmul = torch.empty(64), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    run(plan_sized, (x, x), (64, 64))
    matmul.fp32_precision = "tf32"
    try:
        run(plan_sized, (x, x), (64, 64))
    finally:
        matmul.fp32_precision = before
    assert len(PLANNED) == 2
