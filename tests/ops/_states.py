"""Prints what the ops give, one line for each state that PyTorch was in when this package was imported and first called.

Each in a process of its own, forked from one that has imported PyTorch alone. Where that should change nothing, there is a
second line for the same calls made in that state.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def ordinary():
    return ExitStack()


@contextmanager
def autocast_without_gradients():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def float64_under_modes():
    torch.set_default_dtype(torch.float64)
    with Mode(), FunctionMode():
        yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def on_meta():
    with torch.device("meta"):
        yield


STATES = {  # whether ordinary calls give the same within
    ordinary: True,
    torch.inference_mode: False,
    autocast_without_gradients: False,
    on_meta: True,
    FakeTensorMode: False,
    float64_under_modes: True,
    forward_ad.dual_level: True,
}


def first_calls():
    """Of whatever kind the state makes them."""
    from i2v_kernels.testing import OPINFOS

    for info in OPINFOS:
        with suppress(Exception):
            sample = info.samples()[0].to(torch.float32, requires_grad=True)
            torch.autograd.grad(info.op(*sample.args, **sample.kwargs).sum(), sample.tensors())


def calls(stack):
    """A digest of outputs and gradients; inputs are made outside of the state."""
    from i2v_kernels.testing import OPINFOS

    samples = [(info, sample.to(torch.float32, requires_grad=True)) for info in OPINFOS for sample in info.samples()[:1]]
    digest = hashlib.sha256()
    for info, sample in samples:
        with stack():
            out = info.op(*sample.args, **sample.kwargs)
            results = [out, *torch.autograd.grad(out, sample.tensors(), out.detach())]
        for result in results:
            assert result.is_cpu and not result.is_inference() and type(result) is torch.Tensor
            digest.update(f"{info} {result.dtype} {result.stride()}".encode() + result.detach().numpy().tobytes())
    return digest.hexdigest()


def main():
    torch.set_num_threads(1)
    for state, alike in STATES.items():
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            code = 1
            try:
                with state():
                    import i2v_kernels  # noqa: F401

                    first_calls()
                print(state.__name__, calls(ordinary), flush=True)
                if alike:
                    print("within", calls(state), flush=True)
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0, state


if __name__ == "__main__":
    main()
