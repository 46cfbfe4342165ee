"""What runs an op: its definition in PyTorch, C++ for CPUs, Triton. Each says why it cannot run a call, if it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _extension
from . import dispatcher
from .layout import empty_dense_like

if TYPE_CHECKING:
    from .base import Op

OPS: dict[str, Op] = {}  # by name, as they are registered
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. A native one is registered at ``torch.ops.i2v_kernels.<op>`` itself, in C++.

    ``can_run`` takes the schema's arguments without the backend's name and returns None, or the reason why this backend
    cannot run them. ``forward`` takes the same, ``backward`` those of the backward schema; an op in place has none.
    ``formula`` computes what ``forward`` does by PyTorch's operators alone, so that PyTorch can follow it where kernels have
    no rule: tangents, gradients of gradients, ``torch.func``. It may leave the last arguments and results out.
    """

    name: str
    can_run: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any] = lambda *args: None
    native: bool = False
    formula: Callable[..., Any] | None = None


def cpu_backend(op: str) -> Backend:
    """The backend ``cpu``: csrc/<op>/cpu.cpp, which the extension registers at ``torch.ops.i2v_kernels.<op>`` itself."""

    def can_run(*args: Any) -> str | None:
        if args[0].device.type != "cpu":
            return f"the tensors are on {args[0].device}"
        return _extension.why_no_cpu()

    def run(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(torch.ops.i2v_kernels, name)(*args, "cpu")

    return Backend("cpu", can_run, run(op), run(f"{op}_backward"), native=True)


def reference_backend(
    op: str,
    forward: Callable[..., Any],
    backward: Callable[..., Tensor] | None = None,
    *,
    name: str = "reference",
    can_run: Callable[..., str | None] = lambda *args: None,
    through: Callable[..., Any] | None = None,
    formula: Callable[..., Any] | None = None,
) -> Backend:
    """The backend ``reference``, or another one written in PyTorch; its backward is autograd through ``forward``, or
    ``through`` where that takes fewer arguments, unless one is given.

    Results are copied into memory that the op's fake implementations arrange, so that every backend's lie alike.
    """

    def run(*args: Any) -> Any:
        return _into(f"{op}: backend={name!r}", OPS[op].fake(*args), forward(*args))

    def derive(grad: Tensor, *args: Any) -> Any:
        memory, what = OPS[op].fake_backward(grad, *args), f"{op}_backward: backend={name!r}"  # type: ignore[misc]
        if backward is not None:
            return _into(what, memory, backward(grad, *args))
        if not grad.is_contiguous() and (dense := empty_dense_like(grad)).stride() != grad.stride():
            grad = dense.copy_(grad)  # PyTorch's convolutions refuse gradients whose elements share memory
        function, differentiable = through or forward, OPS[op].differentiable
        inputs = list(args[: function.__code__.co_argcount])
        for i in differentiable:
            if inputs[i] is not None:
                inputs[i] = inputs[i].detach().requires_grad_()
        leaves = [inputs[i] for i in differentiable if inputs[i] is not None]
        with dispatcher.autograd_again():
            result = function(*inputs)
            grads = iter(torch.autograd.grad(result if isinstance(result, Tensor) else result[0], leaves, grad))
        found = [None if inputs[i] is None else next(grads) for i in differentiable]
        if isinstance(memory, Tensor):
            return _into(what, memory, found[0])
        unwanted = (into.shape == (0,) for into in memory)
        return _into(what, memory, [into if empty else part for into, part, empty in zip(memory, found, unwanted)])

    return Backend(name, can_run, run, derive, formula=formula or through or forward)


def _into(what: str, memory: Any, result: Any) -> Any:
    """The memory, filled with the result: a tensor, or several."""
    if isinstance(memory, Tensor):
        if result.shape != memory.shape:
            raise RuntimeError(f"{what} gives {tuple(result.shape)} where the fake implementation has {tuple(memory.shape)}")
        return memory.copy_(result)
    return tuple(_into(what, into, part) for into, part in zip(memory, result, strict=True))


def triton_backend(op: str, limits: Callable[..., str | None]) -> Backend:
    """The backend ``triton``: ``ops/<op>/triton_kernels.py``, imported at its first call.

    ``limits`` takes the arguments of ``forward`` and returns None, or what about them the kernels do not take.
    """

    def can_run(*args: Any) -> str | None:
        first = args[0]
        if not first.is_cuda and not (INTERPRETED and first.device.type == "cpu"):
            return f"the tensors are on {first.device} (and TRITON_INTERPRET=1 is not set)"
        if not has_triton():
            return "triton is not installed"
        return limits(*args)

    @cache
    def kernels() -> Any:
        return importlib.import_module(f"i2v_kernels.ops.{op}.triton_kernels")

    return Backend("triton", can_run, lambda *args: kernels().forward(*args), lambda *args: kernels().backward(*args))


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
