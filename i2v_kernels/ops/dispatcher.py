"""PyTorch's dispatcher: when it has nothing to do for a call, and how its work is asked for again."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

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
            if arg.is_neg():
                return False
        elif kind not in NUMBERS and isinstance(arg, Tensor):
            return False
    return (
        included().raw_repr() in ORDINARY
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd._profiler_enabled()
    )


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
