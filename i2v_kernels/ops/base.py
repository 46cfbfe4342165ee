"""What every op of this package is made of: a schema, backends with reasons, a choice among them, and autograd.

An op is one ``Op``. Registering it makes ``torch.ops.i2v_kernels.<name>`` and ``<name>_backward``, with fake
implementations for ``torch.compile`` and ``torch.export`` and a differentiable autograd kernel. The last argument of both
is the backend's name, or ``""`` for the automatic choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from . import derivatives, dispatcher
from .backends import OPS, Backend
from .layout import empty_dense_like

LIBRARY = torch.library.Library("i2v_kernels", "DEF")
BACKENDS = ("reference", "sdpa", "library", "cpu", "triton", "cuda")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORCED = os.environ.get("I2V_KERNELS_BACKEND", "")
if FORCED and FORCED not in BACKENDS:
    raise ValueError(f"I2V_KERNELS_BACKEND={FORCED!r} is not one of {', '.join(BACKENDS)}")


class _Recorded(Exception):
    """Ends a call whose arguments alone are wanted."""


@dataclass
class Op:
    """A registered op. It returns a tensor, or several of which the first is differentiable; or it works in place.

    ``schema``: the arguments, tensors first, and the returns, without the trailing ``str backend``.
    ``backward_schema``: the same of the backward op. It takes the gradient of the (first) output and then, as a rule, what the
    forward op takes; it returns a gradient for each differentiable input. Where there are several, its last argument is
    ``bool[n] wanted``, and those that are not wanted are empty. An op in place overwrites its first argument,
    ``(Tensor(a!) x, ...) -> ()``, and stops before ``backward_schema``: autograd does not record it, but is told that x has
    changed.
    ``fake``: the memory of the outputs, uninitialised, from the forward op's arguments; of any shape.
    ``fake_backward``: that of the gradients, from the backward op's arguments; ``empty_gradients`` unless it is given.
    ``preference``: device type -> names of backends in the order of automatic choice, measured. Where none of them can run, or
    none is named, it is ``reference``.
    ``by_name_only``: backend -> why it is never chosen automatically.
    ``differentiable``: the places of the inputs whose gradients the backward op returns; the first ones unless it is given.
    ``forward_args``: (arguments of the backward op, their number in the forward op) -> what ``can_run`` judges.
    ``save``: ``(ctx, inputs, result) -> None``, ``gradients``: ``(ctx, grad) -> one gradient per input``: the autograd rule.
    ``save_inputs`` and ``wanted_gradients`` unless they are given. What is saved begins with the tensors among the inputs,
    and ``ctx.rest`` holds the others that the backward op takes; where an op keeps less, ``again`` is its gradients written
    in PyTorch's operators.
    """

    name: str
    schema: str
    backends: Sequence[Backend]
    fake: Callable[..., Any]
    preference: dict[str, tuple[str, ...]] = field(default_factory=dict)
    backward_schema: str = ""
    fake_backward: Callable[..., Any] | None = None
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None
    gradients: Callable[[Any, Tensor], tuple[Tensor | None, ...]] | None = None
    by_name_only: dict[str, str] = field(default_factory=dict)
    differentiable: Sequence[int] = ()
    forward_args: Callable[[Sequence[Any], int], Sequence[Any]] = lambda args, count: args[1 : 1 + count]
    again: Callable[[Any, Tensor], tuple[Tensor | None, ...]] | None = None

    def __post_init__(self) -> None:
        self._by_name = {backend.name: backend for backend in self.backends}
        self._check()
        OPS[self.name] = self
        self._recorders: dict[int, list[tuple[Any, ...]]] = {}  # by thread
        self.fake_backward = self.fake_backward or self.empty_gradients
        self.save = self.save or self.save_inputs
        self.gradients = self.gradients or self.wanted_gradients
        self.forced = FORCED if FORCED in self._by_name else ""
        self._in_cpp = any(backend.native for backend in self.backends) and _extension.why_no_cpu() is None
        for name, schema, run, fake in (
            (self.name, self.schema, self._forward, self._fake),
            (f"{self.name}_backward", self.backward_schema, self._backward, self._fake_backward),
        ):
            if not schema:
                continue
            arguments, returns = schema.split(" -> ")
            LIBRARY.define(f"{name}{arguments[:-1]}, str backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
            LIBRARY.impl(name, run, "CUDA")
            if self._in_cpp:  # see csrc/common/dispatch.h
                LIBRARY.define(f"{name}_by_name{arguments[:-1]}, str backend) -> {returns}")
                LIBRARY.impl(f"{name}_by_name", run, "CPU")
            else:
                LIBRARY.impl(name, run, "CPU")
            LIBRARY.impl(name, derivatives.with_memory(getattr(torch.ops.i2v_kernels, name)), "ZeroTensor")
            torch.library.register_fake(f"i2v_kernels::{name}", fake, lib=LIBRARY)
        self.forward_op = getattr(torch.ops.i2v_kernels, self.name).default
        inputs = self.forward_op._schema.arguments[:-1]
        self.arity, self.tensors = len(inputs), sum("Tensor" in str(argument.type) for argument in inputs)
        self.single = len(self.forward_op._schema.returns) == 1
        LIBRARY.impl(self.name, partial(derivatives.by_formula, self), "FuncTorchBatched")
        if self.backward_schema:
            self.backward_op = getattr(torch.ops.i2v_kernels, f"{self.name}_backward").default
            self.differentiable = tuple(self.differentiable or range(len(self.backward_op._schema.returns)))
            self._asks = any(argument.name == "wanted" for argument in self.backward_op._schema.arguments)
            self._function = derivatives.autograd_function(self, self.forward_op)
            # without what Function.apply does in Python, which concerns functorch's transforms alone
            self._apply = super(torch.autograd.Function, derivatives.autograd_function(self, self._run)).apply  # type: ignore[misc]
            LIBRARY.impl(self.name, self._autograd, "Autograd")
            LIBRARY.impl(f"{self.name}_backward", self._autograd_of_backward, "Autograd")
        else:
            LIBRARY.impl(self.name, self._in_place, "Autograd")
            LIBRARY.impl(self.name, self._in_place, "ADInplaceOrView")  # all that inference mode leaves of autograd

    def _check(self) -> None:
        """What would else come out at a call, and not say so."""
        named = [name for names in (("reference",), *self.preference.values(), self.by_name_only) for name in names]
        if lacking := sorted(set(named) - set(self._by_name)):
            raise ValueError(f"{self.name}: backends={list(self._by_name)} lack {', '.join(lacking)}")
        tensors = ["Tensor" in str(argument.type) for argument in torch._C.parse_schema(f"op{self.schema}").arguments]
        if tensors != sorted(tensors, reverse=True):
            raise ValueError(f"{self.name}: schema={self.schema!r}, but tensors must come first")
        if self.backward_schema:
            returned = len(torch._C.parse_schema(f"op{self.backward_schema}").returns)
            if returned > sum(tensors) or len(self.differentiable or range(returned)) != returned:
                what = f"{returned} gradients of {sum(tensors)} tensors, differentiable={tuple(self.differentiable)}"
                raise ValueError(f"{self.name}: backward_schema={self.backward_schema!r} returns {what}")

    def __call__(self, *args: Any, backend: str | None, prefer: str = "") -> Any:
        """Run the op; ``backend=None`` chooses, before all others the backend ``prefer`` if that can."""
        if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
            raise ValueError(f"{self.name}: backend={backend!r} is not one of {', '.join(BACKENDS)}")
        backend = backend or self.forced or (prefer and f"{prefer}?")
        if torch.compiler.is_compiling():
            return self.forward_op(*args, backend)  # _fake looks whether the backend can run
        if self._recorders and (calls := self._recorders.get(get_ident())) is not None:
            calls.append((*args, backend))
            raise _Recorded
        direct = bool(self.backward_schema) and self._direct(args)
        if backend and not direct:
            self.choose(args, backend)
        if not self.backward_schema:
            return self._in_place(*args, backend)
        if torch.is_grad_enabled():
            if not direct:
                return self.forward_op(*args, backend)
            for arg in args:
                if type(arg) not in dispatcher.NUMBERS and isinstance(arg, Tensor) and arg.requires_grad:
                    return self._apply(*args, self.choose(args, backend))
        elif not direct and dispatcher.transforming():  # which no_grad does not end
            return self.forward_op(*args, backend)
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record: spare the way through Python that would find so
            return self._forward(*args, backend) if direct else self.forward_op(*args, backend)

    def _direct(self, args: Sequence[Any]) -> bool:
        """Whether the dispatcher would do nothing with these arguments but call this op's kernels in Python.

        That takes it several microseconds each time.
        """
        first = args[0]
        return (first.is_cuda or (first.is_cpu and not self._in_cpp)) and dispatcher.is_idle(args)

    @contextmanager
    def recording(self, calls: list[tuple[Any, ...]]) -> Iterator[None]:
        """Within: calls of the public function in this thread append their checked arguments to ``calls``, compute nothing."""
        self._recorders[get_ident()] = calls
        try:
            yield
        except _Recorded:
            pass
        finally:
            del self._recorders[get_ident()]

    def why_not(self, name: str, args: Sequence[Any]) -> str | None:
        """None if the backend of that name can run these arguments, else the reason."""
        if name not in self._by_name:
            return f"{self.name} has no such backend"
        return self._by_name[name].can_run(*args)

    def choose(self, args: Sequence[Any], requested: str = "", *, quiet: bool = False) -> Backend:
        """The backend that runs these arguments; a requested one raises ``NotImplementedError`` if it cannot.

        With a question mark behind its name it is preferred, not requested. Unless ``quiet``, it is said once where that is
        the reference because the C++ kernels are missing.
        """
        if requested.endswith("?"):
            preferred = self._by_name[requested[:-1]]
            if preferred.can_run(*args) is None:
                return preferred
        elif requested:
            reason = self.why_not(requested, args)
            if reason is not None:
                raise NotImplementedError(f"{self.name}: backend={requested!r} cannot run this call: {reason}")
            return self._by_name[requested]
        for name in self.preference.get("cuda" if args[0].is_cuda else args[0].device.type, ()):
            backend = self._by_name[name]
            if backend.can_run(*args) is None:
                return backend
        if args[0].is_cpu and "cpu" in self._by_name and not quiet:
            _extension.warn_of_reference()
        return self._by_name["reference"]

    def first_choice(self, device: str) -> str:
        """The backend that this device type is meant to run."""
        return next(iter(self.preference.get(device, ())), "reference")

    @staticmethod
    def _run(*args: Any) -> Any:
        """With the backend itself as the last argument."""
        *given, backend = args
        return backend.forward(*given)

    def _fake(self, *args: Any) -> Any:
        if args[-1] and args[0].device.type != "meta":
            self.choose(args[:-1], args[-1])
        return self.fake(*args[:-1])

    def _fake_backward(self, *args: Any) -> Any:
        return self.fake_backward(*args[:-1])  # type: ignore[misc]

    def _forward(self, *args: Any) -> Any:
        *given, backend = args
        return self.choose(given, backend).forward(*given)

    def _backward(self, *args: Any) -> Any:
        *given, backend = args
        return self.choose(self.forward_args(given, self.arity), backend).backward(*given)

    def with_formula(self, requested: str = "") -> Backend:
        """The backend whose formula gives derivatives that kernels have no rule for: one by name, else the reference."""
        name = "reference" if not requested or requested.endswith("?") else requested
        backend = self._by_name.get(name)
        if backend is None or backend.formula is None:
            raise NotImplementedError(
                f"{self.name}: backend={name!r} has no rule for forward-mode derivatives, gradients of gradients and the "
                'transforms of torch.func; use backend="reference"'
            )
        return backend

    def _autograd(self, *args: Any) -> Any:
        if dispatcher.needs_formula(args):
            return derivatives.by_formula(self, *args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return self._function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward_op(*args)

    def _autograd_of_backward(self, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if recorded or dispatcher.needs_formula(args):
            raise NotImplementedError(
                f"{self.name}_backward: the registered op has no derivatives of its own; for gradients of gradients "
                f"differentiate i2v_kernels.{self.name} with create_graph=True"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op(*args)

    def _in_place(self, *args: Any) -> None:
        if torch.is_grad_enabled() and args[0].requires_grad:
            first = self.forward_op._schema.arguments[0].name
            raise ValueError(
                f"{self.name}: {first}.requires_grad=True, but autograd cannot record what overwrites {first}: "
                f"use {self.name.removesuffix('_')}, or torch.no_grad()"
            )
        if dispatcher.needs_formula(args):
            derivatives.by_formula(self, *args)
            return
        torch.autograd.graph.increment_version(args[0])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            (self._forward if self._direct(args) else self.forward_op)(*args)

    def save_inputs(self, ctx: Any, inputs: tuple[Any, ...], result: Any) -> None:
        """All that the forward op takes, and nothing else."""
        ctx.save_for_backward(*inputs[: self.tensors])
        ctx.rest = inputs[self.tensors :]

    def wanted_gradients(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """By the backward op, which takes (grad, the tensors, ctx.rest, what else was saved, what is wanted)."""
        saved, wanted = ctx.saved_tensors, [ctx.needs_input_grad[i] for i in self.differentiable]
        asked = (wanted,) if self._asks else ()
        found = self.derive(grad, *saved[: self.tensors], *ctx.rest, *saved[self.tensors :], *asked, ctx.backend)
        grads: list[Tensor | None] = [None] * self.arity
        for i, part, want in zip(self.differentiable, (found,) if isinstance(found, Tensor) else found, wanted):
            grads[i] = part if want else None
        return tuple(grads)

    def empty_gradients(self, grad: Tensor, *args: Any) -> Any:
        """Gradients of the differentiable inputs, uninitialised: the first in its input's order in memory, others contiguous,
        those that are not wanted empty.
        """
        wanted = args[-1] if self._asks else [True] * len(self.differentiable)
        parts = []
        for i, want in zip(self.differentiable, wanted):
            x = args[i] if want else None
            if x is None:
                parts.append(grad.new_empty(0))
            elif i == self.differentiable[0]:
                parts.append(empty_dense_like(x))
            else:
                parts.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        return tuple(parts) if len(parts) > 1 else parts[0]

    def within(self, *args: Any) -> Any:
        """The forward op, called by a kernel of another one."""
        return (self._forward if self._direct(args) else self.forward_op)(*args)

    def derive(self, *args: Any) -> Any:
        """The backward op; the last argument is a backend, or the name of one, or "" for the automatic choice."""
        *given, backend = args
        with torch._C._AutoDispatchBelowAutograd():
            if not self._direct(given):
                return self.backward_op(*given, backend.name if isinstance(backend, Backend) else backend)
            return backend.backward(*given) if isinstance(backend, Backend) else self._backward(*args)


def needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd will ask for the gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over this dtype are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
