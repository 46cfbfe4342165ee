"""Broken kernels for test_gpu_stages.py: a stub run must find each of them, in the stage that is there for it."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

import torch

from i2v_kernels.ops import base


def change(op, backend, **changes):
    """Replaces what a backend does: ``forward(original, *args)`` in place of ``forward(*args)``."""
    found = base.OPS[op]._by_name[backend]
    bound = {name: partial(function, getattr(found, name)) for name, function in changes.items()}
    base.OPS[op]._by_name[backend] = dataclasses.replace(found, **bound)


def all_at_once():
    """One fault for each stage, of one backend each."""

    def fails(old, *args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def a_percent_off(old, q, *args):
        out, lse = old(q, *args)
        return (out.mul_(1.01) if q.dtype == torch.float16 else out), lse

    def dies(old, grad, *args):
        if grad.dtype == torch.float16 and grad.shape == (1, 4, 3, 2, 64):
            os._exit(66)
        return old(grad, *args)

    def wrong_when_large(old, x, *args):
        return old(x, *args) * (1.5 if len(x) > 2 else 1)

    def writes_beside_its_output(old, *args):
        print("========= Invalid __global__ write of size 2 bytes")  # what compute-sanitizer would say of it
        return old(*args)

    change("token_shift_", "triton", forward=fails)  # smoke alone calls it
    change("temporal_attention", "triton", forward=a_percent_off)  # in float16, which the tests try
    change("temporal_attention", "cuda", backward=dies)  # likewise, and takes its process along
    change("lora_linear", "library", forward=wrong_when_large)  # the bench's calls are the large ones
    change("temporal_conv", "cuda", forward=writes_beside_its_output)


def triton_is_missing():
    change("patch_embed", "triton", can_run=lambda old, *args: "triton is not installed")
