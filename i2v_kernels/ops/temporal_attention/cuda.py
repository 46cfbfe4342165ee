"""The backend ``cuda``: the kernels of csrc/temporal_attention/cuda.cu. CPU tensors would run their emulation, in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ... import _extension
from .packing import empty_grads, empty_output, unpacked

LONGEST, WIDEST, HEADS = 32, 256, 256
WARPS = 2048  # that sum the gradient of a bias: a few for each scheduler of a large GPU


def can_run(q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    return limits(q, k, v) or _extension.why_no_cuda()


def limits(q: Tensor, k: Tensor | None, v: Tensor | None) -> str | None:
    """What of a call's shapes the kernels do not take."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}: the kernels take float16 and bfloat16"
    queries, keys, heads, dim = q.shape[1], q.shape[1] if k is None else k.shape[1], *q.shape[-2:]
    if queries > LONGEST or keys > LONGEST:
        return f"T={queries}, Tk={keys}: the kernels take at most {LONGEST} frames"
    if dim % 8 or not 8 <= dim <= WIDEST or heads > HEADS:
        return f"H={heads}, D={dim}: the kernels take D in multiples of 8 up to {WIDEST} and at most {HEADS} heads"
    for name, x in zip("qkv", (q, k, v)):
        if x is not None and not _aligned(x):
            place = f"{name}.stride()={x.stride()}, storage_offset()={x.storage_offset()}"
            return f"{place}: the kernels need every row to begin at a multiple of 16 bytes"
    return None


def _aligned(x: Tensor) -> bool:
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    return all(step % 8 == 0 for step in steps) and bool(_address(x) % 16 == 0)


def _address(x: Tensor) -> int | torch.SymInt:
    """Where the tensor begins: foreign memory (DLPack) may do so anywhere. Of a tensor without memory, within its storage."""
    within = int(x.storage_offset()) * x.element_size()
    if isinstance(x, FakeTensor):
        return within
    try:
        return x.data_ptr() or within
    except RuntimeError:  # of torch.func's wrappers
        return within


def forward(
    q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, offsets: Sequence[int] | None,
    scale: float, left: int, right: int, want_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = empty_output(q, want_lse)
    launch = _extension.compiled("temporal_attention")
    launch(q, k, v, bias, mask, offsets, scale, left, right, out, lse if want_lse else None)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, bias: Tensor | None, mask: Tensor | None,
    offsets: Sequence[int] | None, scale: float, left: int, right: int, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dbias = empty_grads(grad, q, k, v, bias, bias_grad)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dbias.zero_()
    sums = None
    if bias_grad:
        like = unpacked(q, k, v)[1]
        batch, keys, tokens, heads, _ = like.shape
        units = batch * (-(-tokens // 2) if max(q.shape[1], keys) <= 8 else tokens)
        shares = max(1, min(units, WARPS // heads))
        sums = torch.empty(shares, heads, q.shape[1], keys, dtype=torch.float32, device=q.device)
    launch = _extension.compiled("temporal_attention_backward")
    grad = grad if _aligned(grad) else grad.clone(memory_format=torch.contiguous_format)
    pair = (None, None) if k is None else (dk, dv)
    launch(grad, q, k, v, bias, mask, offsets, scale, left, right, dq, *pair, sums)
    if sums is not None:
        torch.sum(sums, 0, out=dbias)
    return dq, dk, dv, dbias
