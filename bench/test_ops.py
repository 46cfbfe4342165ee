"""The same comparison for pytest-benchmark: ``pytest bench``; the tests run it with --benchmark-disable."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from i2v_kernels.testing import OPINFOS

from .__main__ import candidates, check, forward, forward_backward

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
        run = partial(forward_backward, function, sample, torch.randn_like(sample.args[0]))

    def synchronised():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{info} {mode}"
    benchmark.extra_info |= {"shape": list(sample.args[0].shape), "bytes": info.traffic(sample)}
    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=3)
