"""PyTorch's dispatcher: when it has nothing to do for a call, and how its work is asked for again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

NUMBERS = frozenset((type(None), bool, int, float, str, list, tuple))  # what arguments are that are no tensors
included = torch._C._dispatch_tls_local_include_set


def outermost() -> tuple[Any, ...]:
    """Its keys included and excluded where no mode is on, and those included in inference mode: in a new thread."""

    def ask() -> None:
        found.extend((included(), torch._C._dispatch_tls_local_exclude_set()))
        with torch.inference_mode():
            found.append(included())

    found: list[Any] = []
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return tuple(found)


*OUTERMOST, _INFERENCE = outermost()
ORDINARY = (OUTERMOST[0].raw_repr(), _INFERENCE.raw_repr())


def is_idle(args: Iterable[Any]) -> bool:
    """Whether it would only pass these arguments on to an op's kernel, and to autograd before.

    It may have more to do under modes, transforms, tracers and profilers, and for tensors of other classes.
    """
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            if arg.is_neg() or arg._is_zerotensor():
                return False
        elif kind not in NUMBERS and isinstance(arg, Tensor):
            return False
    return (
        included().raw_repr() in ORDINARY
        and forward_ad._current_level < 0
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd._profiler_enabled()
    )


def transforming() -> bool:
    """Whether a transform of ``torch.func`` is on, or forward-mode differentiation: in any thread, for any tensor."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_formula(args: Iterable[Any]) -> bool:
    """Whether derivatives of these arguments are followed that kernels know nothing of: by ``torch.func``, or as tangents."""
    if not transforming():
        return False
    return torch._C._are_functorch_transforms_active() or any(isinstance(arg, Tensor) and has_tangent(arg) for arg in args)


def is_transformed(x: Tensor) -> bool:
    """Whether x stands for other tensors in a transform of ``torch.func``: formulas take it, whatever its strides."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_gradtrackingtensor(x)


def has_tangent(x: Tensor) -> bool:
    """Whether x is a dual number."""
    return forward_ad.unpack_dual(x).tangent is not None


class autograd_again:
    """Inside an op's kernel the dispatcher skips autograd; the reference's backward needs it back."""

    def __enter__(self) -> None:
        self._guard = torch._C._ForceDispatchKeyGuard(*OUTERMOST)
        self._guard.__enter__()
        self._grad = torch.enable_grad()
        self._grad.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._grad.__exit__(*exc)
        self._guard.__exit__(*exc)
