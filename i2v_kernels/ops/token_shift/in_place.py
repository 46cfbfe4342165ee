"""``token_shift_``: the shift in place, for inference. Only what moves is read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _extension
from ..base import BACKENDS, FORCED, INTERPRETED, LIBRARY
from . import reference
from .op import MAX_GROUPS, check

NAME = "token_shift_"


def token_shift_(
    x: Tensor,
    groups: Sequence[tuple[int, int]],
    *,
    padding: str = "zeros",
    tokens: tuple[int, ...] | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`token_shift` in place, for inference: writes the channels and tokens that move, and returns x.

    TokShift moves channels of the class token alone: of ViT-B/16's tokens one in 197.

    Args:
        x, groups, padding, tokens: as in :func:`token_shift`. x must not share memory with itself.
        backend: "reference", "cpu" or "triton" (not for "wrap"); None chooses.

    Raises:
        TypeError, ValueError: as :func:`token_shift`; x needs a gradient, or overlaps itself.
        NotImplementedError: the named backend cannot run this call; the text says why.
    """
    arguments = check(NAME, x, groups, padding, tokens)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{NAME}: x.requires_grad=True, but no gradient is recorded: use token_shift or torch.no_grad()")
    if _overlaps(x):
        raise ValueError(f"{NAME}: x.stride()={tuple(x.stride())} overlaps itself for x.shape={tuple(x.shape)}: pass a copy")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{NAME}: backend={backend!r} is not one of {', '.join(BACKENDS)}")
    backend = backend or FORCED
    if backend and not torch.compiler.is_compiling():
        reason = _why_not(backend, x, *arguments)
        if reason is not None:
            raise NotImplementedError(f"{NAME}: backend={backend!r} cannot run this call: {reason}")
    torch.ops.i2v_kernels.token_shift_(x, *arguments, backend)
    return x


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may lie at one address."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride()) if size > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def _why_not(backend: str, x: Tensor, channels: Any, offsets: Any, padding: str, *_: Any) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpu":
        return _extension.why_no_cpu() if x.device.type == "cpu" else f"the tensor is on {x.device}"
    if backend != "triton":
        return f"{NAME} has no such backend"
    if x.device.type != "cuda" and not (INTERPRETED and x.device.type == "cpu"):
        return f"the tensor is on {x.device}"
    if padding == "wrap":
        return "padding='wrap' has no direction in which nothing is overwritten before it is read"
    if len(channels) > MAX_GROUPS:
        return f"{len(channels)} groups: the kernels take at most {MAX_GROUPS}"
    return None


def _shift(x: Tensor, *rest: Any) -> None:
    *arguments, backend = rest
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # who kept x for its gradient is to know
    if not backend:
        order = ("cpu", "reference") if x.device.type == "cpu" else ("triton", "reference")
        backend = next(name for name in order if _why_not(name, x, *arguments) is None)
    if backend == "cpu":
        _extension.compiled("token_shift_in_place")(x, *arguments)
    elif backend == "triton":
        from . import triton_kernels  # not where there is no triton

        triton_kernels.shift_in_place(x, *arguments)
    else:
        channels, offsets, padding, start, stop, step = arguments
        moving = x[:, :, start:stop:step, : sum(channels)]
        moving.copy_(reference.forward(moving, channels, offsets, padding, 0, moving.shape[2], 1, False))


_ARGUMENTS = "int[] channels, int[] offsets, str padding, SymInt start, SymInt stop, SymInt step, str backend"
LIBRARY.define(f"{NAME}(Tensor(a!) x, {_ARGUMENTS}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl(NAME, _shift, "CPU")
LIBRARY.impl(NAME, _shift, "CUDA")
torch.library.register_fake(f"i2v_kernels::{NAME}", lambda *_: None, lib=LIBRARY)
