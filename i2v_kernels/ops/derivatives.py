"""The derivatives of an op: by its backward op, and by its formula in PyTorch's operators where kernels have no rule.

Kernels know the first gradient alone. Tangents (forward mode), gradients of gradients (``create_graph=True``), batches of
gradients and the transforms of ``torch.func`` follow what a formula of PyTorch's operators does: as fast and as large as that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import dispatcher
from .layout import arranged

if TYPE_CHECKING:
    from .base import Op


def autograd_function(op: Op, run: Callable[..., Any]) -> Any:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.backend = args[-1]
            with torch._C._AutoDispatchBelowAutograd():
                result = run(*args)
            op.save(ctx, args[:-1], result)  # type: ignore[misc]
            if not isinstance(result, Tensor):
                ctx.mark_non_differentiable(*result[1:])
            ctx.set_materialize_grads(False)  # of the others: zeros of their size that nobody reads
            return result

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
            if grad is None:  # a later function had none for the output
                return (None,) * (op.arity + 1)
            if torch.is_grad_enabled() or (dispatcher.transforming() and dispatcher.needs_formula((grad,))):
                return (*gradients_again(op, ctx, grad), None)
            if grad.dim() > 0 and grad.stride(-1) != 1 and grad.shape[-1] != 1:
                # expanded gradients, as from .sum(); what is empty counts as contiguous whatever its strides
                grad = grad.contiguous() if grad.numel() > 0 else grad.new_empty(grad.shape)
            return (*op.gradients(ctx, grad), None)  # type: ignore[misc]

    Function.__name__ = Function.__qualname__ = "".join(part.title() for part in op.name.split("_"))
    return Function


def gradients_again(op: Op, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as PyTorch's operators give them, which can be differentiated, or batched, in their turn."""
    if op.again is not None:
        return op.again(ctx, grad)
    requested = ctx.backend if isinstance(ctx.backend, str) else ctx.backend.name
    backend = op._by_name.get(requested)
    formula = (backend if backend and backend.formula else op.with_formula()).formula
    assert formula is not None
    wanted, create_graph = ctx.needs_input_grad[: op.tensors], torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: what one input owes to another has been told apart, and is told on by the graph behind these.
        inputs = [x.view_as(x) if want else x for x, want in zip(ctx.saved_tensors[: op.tensors], wanted)]
        result = formula(*inputs, *ctx.rest)
        found = iter(
            torch.autograd.grad(
                result if isinstance(result, Tensor) else result[0],
                [x for x, want in zip(inputs, wanted) if want],
                grad,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    return (*(next(found) if want else None for want in wanted), *[None] * (op.arity - op.tensors))


def by_formula(op: Op, *args: Any) -> Any:
    """The op for tangents and for the transforms of torch.func, which follow PyTorch's own operators."""
    *given, requested = args
    backend = op.with_formula(requested)
    assert backend.formula is not None
    result = backend.formula(*given[: backend.formula.__code__.co_argcount])
    if not op.backward_schema:
        return None
    likes = [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x for x in given
    ]
    if op.single:
        return arranged(result, op.fake(*likes))
    first, *others = (result,) if isinstance(result, Tensor) else result
    like, *rest = op.fake(*likes)
    return (arranged(first, like), *(others or (first.new_empty(0) for _ in rest)))


def with_memory(op: Any) -> Callable[..., Any]:
    """The op for zeros that have no memory: PyTorch would lend them that of a single number."""

    def run(*args: Any) -> Any:
        zeros = (isinstance(arg, Tensor) and arg._is_zerotensor() for arg in args)
        return op(*(torch.zeros(a.shape, dtype=a.dtype, device=a.device) if zero else a for a, zero in zip(args, zeros)))

    return run
