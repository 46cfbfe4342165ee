"""Where tests of CUDA C++ kernels run: on the CPU by the kernels' emulation, and on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest

from i2v_kernels import _extension
from i2v_kernels.ops import base


def device_fixture(op, limits):
    """The device of a test. On the CPU, ``backend="cuda"`` of that op is the emulation for the length of the test;
    ``limits`` takes the arguments of the registered op and says what the kernels do not take."""

    @pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def device(request, monkeypatch):
        if request.param == "cuda" and _extension.why_no_cuda() is not None:
            pytest.skip(str(_extension.why_no_cuda()))
        if request.param == "cpu":
            backends = base.OPS[op]._by_name
            monkeypatch.setitem(backends, "cuda", dataclasses.replace(backends["cuda"], can_run=limits))
        return request.param

    return device
