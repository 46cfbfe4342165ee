"""What a call takes besides its arguments: at its peak, and from forward to backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from i2v_kernels.testing import Sample

MIB = 2**20


def peak(call: Callable[[], object], device: str) -> float:
    """MiB that PyTorch's allocator hands out for the call, at most at one time; the second call's, so that caches are full."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / MIB


@contextmanager
def quiet() -> Iterator[None]:
    """PyTorch's profiler writes to the process's standard error each time it starts, whatever it is told."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def kept_for_backward(function: Callable[..., Tensor], sample: Sample) -> float:
    """MiB that autograd keeps besides the arguments themselves."""
    known = {tensor.untyped_storage().data_ptr() for tensor in sample.inputs()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function(*sample.args, **sample.kwargs)  # alive while it is counted: no two may share an address
    del out
    return sum(storages.values()) / MIB
