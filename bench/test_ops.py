"""The same comparison for pytest-benchmark: ``pytest bench``; the tests run it with --benchmark-disable."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from i2v_kernels.testing import OPINFOS, Sample

from . import memory
from .__main__ import candidates, check, forward, forward_backward, on_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    pytest.param(info, name, mode, id=f"{info}-{mode}-{name}")
    for info in OPINFOS
    for mode in ("forward", "forward+backward")
    for name in candidates(info, compiled=False)
]


@pytest.mark.parametrize("info, name, mode", CASES)
def test_op(benchmark, info, name, mode):
    clips = 1 if benchmark.disabled else 4
    sample = info.models(clips)[0].to(torch.float32, DEVICE, requires_grad=True)
    function = candidates(info, compiled=False)[name]
    with torch.no_grad():
        check(info, sample, {name: function})
    run = partial(forward, function, sample)
    if mode != "forward":
        grad = torch.randn_like(function(*sample.args, **sample.kwargs).detach())
        run = partial(forward_backward, function, sample, grad)

    def synchronised():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{info} {mode}"
    benchmark.extra_info |= {"shape": list(sample.args[0].shape), "bytes": info.traffic(sample)}
    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=3)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_what_only_gpus_have_is_left_out_where_it_cannot_run(capsys):
    info = next(info for info in OPINFOS if info.name == "temporal_attention")
    sample = info.models(1)[0].to(torch.float32)
    found = on_gpu(info, sample)
    assert set(found) == {"sdpa flash", "sdpa math"} and "sdpa cudnn cannot run: " in capsys.readouterr().out
    check(info, sample, found)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_memory_is_counted():
    """A function whose memory is known: two tensors of 4 MiB at a time, one of which is kept."""
    sample = Sample("", (torch.zeros(2**20, requires_grad=True),))
    assert memory.peak(lambda: torch.zeros(2**20).exp(), DEVICE) == pytest.approx(8, abs=0.1)
    assert memory.kept_for_backward(lambda x: x.exp() * 2, sample) == pytest.approx(4)
