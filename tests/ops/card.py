"""What test_gpu.py needs of a card. In the stub of ``python -m bench.gpu`` (I2V_GPU_STUB=1) the CPU stands in, with Triton's
interpreter, the CUDA kernels' emulation and sizes to match: no Python error then waits for a card.
"""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext

import torch

STUB = os.environ.get("I2V_GPU_STUB") == "1"
DEVICE = "cpu" if STUB else "cuda"
ROWS = 9 if STUB else 262_144
REPEATS = 1 if STUB else 10
ELEMENTS = 2**10 if STUB else 2**31


def count():
    return 1 if STUB else torch.cuda.device_count()


def model_call(info):
    return info.samples()[0] if STUB else info.models(4)[-1]


def free_memory():
    """Bytes; what earlier tests left in the allocator's cache is given back first."""
    if STUB:
        return 2**40
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def synchronize():
    if not STUB:
        torch.cuda.synchronize()


def other_stream():
    return nullcontext() if STUB else torch.cuda.stream(torch.cuda.Stream())


def keep_busy():
    """The current stream, for a while."""
    if not STUB:
        torch.cuda._sleep(100_000_000)


def captured(step):
    """``(replay, results)``: the step as a CUDA graph, warmed up on a side stream, and the tensors that a replay fills."""
    if STUB:
        results = step()

        def again():
            for into, value in zip(results, step()):
                into.data.copy_(value)

        return again, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results
