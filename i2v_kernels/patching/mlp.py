"""The perceptron of transformer blocks, ``linear -> GELU or QuickGELU -> linear``, however its parts are called.

``x * sigmoid(1.702 * x)`` is ``silu(1.702 * x) / 1.702``, and the matrix products before and after take the factors along:
one pass over the hidden layer in place of three. For backward one tensor of the hidden layer's size is kept, PyTorch keeps two
with GELU and four with QuickGELU. Without gradients the activation is computed in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.plain import is_plain
from .rules import Found, Replacement, class_of, drops, not_plain, random_like

FACTOR = 1.702
QUICK_GELU = ("QuickGELU", "QuickGELUActivation")
GELU = ("GELU", "GELUActivation")


def perceptron(module: Any) -> Found:
    """A ``Sequential``, or a module with ``fc1``, ``fc2`` and an activation; dropout and identities may stand between."""
    parts = _parts(module)
    if parts is None:
        return None
    first, activation, second, _ = parts
    names = {part: name for name, part in module.named_children()}
    reason = not_plain(module, names[first], names[second], kind=nn.Linear) or not_plain(module, *names.values())
    if reason is not None:
        return reason
    quick = type(activation).__name__ in QUICK_GELU
    by = "QuickGELU in one pass between the products" if quick else "GELU's input alone is kept for backward"
    probe = lambda m: (random_like(m, 2, 5, first.in_features),)  # noqa: E731
    return Replacement(_forward, by, probe, uncalled=tuple(names.values()))


def _parts(module: nn.Module) -> tuple[Any, Any, Any, list[Any]] | None:
    """The two layers, the activation between them, and what does nothing outside of training."""
    children = dict(module.named_children())
    if class_of(module) is nn.Sequential:
        parts = list(children.values())
    elif {"fc1", "fc2"} <= children.keys():
        parts = [children.pop("fc1"), *(m for name, m in children.items() if name != "fc2"), children["fc2"]]
    else:
        return None
    idle = [part for part in parts if isinstance(part, (nn.Dropout, nn.Identity))]
    first, *rest = (part for part in parts if part not in idle) if len(parts) > len(idle) else (None,)
    if len(rest) != 2 or type(rest[0]).__name__ not in (*QUICK_GELU, *GELU):
        return None
    return first, rest[0], rest[1], idle


def _forward(module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    parts = _parts(module)
    if parts is None or len(args) != 1 or kwargs or not may_fuse(*parts):
        return original(*args, **kwargs)
    first, activation, second, _ = parts
    return fused(args[0], first, activation, second)


def may_fuse(first: nn.Module, activation: nn.Module, second: nn.Module, idle: list[Any]) -> bool:
    """Whether ``fused`` gives what these modules give, called one after the other."""
    known = type(activation).__name__ in QUICK_GELU or (
        type(activation).__name__ in GELU and getattr(activation, "approximate", "none") == "none"
    )
    plain = is_plain(first, second, kind=nn.Linear) and is_plain(activation, *idle)
    return known and plain and not any(drops(part, getattr(part, "p", 0.0)) for part in idle)


def fused(x: Tensor, first: Any, activation: nn.Module, second: Any) -> Tensor:
    """``second(activation(first(x)))``."""
    tensors: list[Any] = [x, first.weight, first.bias, second.weight, second.bias]
    kind, quick = x.device.type, type(activation).__name__ in QUICK_GELU
    if not torch.is_autocast_enabled(kind):
        return _perceptron(*tensors, quick=quick)
    dtype = torch.get_autocast_dtype(kind)
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    with torch.autocast(kind, enabled=False):
        return _perceptron(*tensors, quick=quick)


def _perceptron(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, quick: bool) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2)):
        return _Perceptron.apply(x, w1, b1, w2, b2, quick)
    hidden = _hidden(x, w1, b1, quick)
    active = F.silu(hidden, inplace=True) if quick else torch.ops.aten.gelu_(hidden)
    return _output(active, x, w2, b2, quick)


def _hidden(x: Tensor, w1: Tensor, b1: Tensor | None, quick: bool) -> Tensor:
    """The activation's input as rows; QuickGELU's times its factor."""
    scale = FACTOR if quick else 1.0
    return _product(b1, x.reshape(-1, x.shape[-1]), w1.t(), scale, scale)


def _output(active: Tensor, x: Tensor, w2: Tensor, b2: Tensor | None, quick: bool) -> Tensor:
    return _product(b2, active, w2.t(), 1, 1 / FACTOR if quick else 1).view(*x.shape[:-1], -1)


def _product(bias: Tensor | None, rows: Tensor, matrix: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    if bias is None:
        return torch.addmm(rows.new_empty(1), rows, matrix, beta=0, alpha=alpha)
    return torch.addmm(bias, rows, matrix, beta=beta, alpha=alpha)


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, quick: bool) -> Tensor:
        ctx.quick, ctx.shape = quick, x.shape
        hidden = _hidden(x, w1, b1, quick)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, hidden, w1, w2)
        return _output(F.silu(hidden) if quick else F.gelu(hidden), x, w2, b2, quick)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # not once_differentiable: that says nothing where grad itself needs no gradient
            raise NotImplementedError(
                "a patched perceptron has no gradients of gradients (create_graph=True): too little is kept for them; "
                "unpatch() the model, or patch(model, exclude=...) these modules"
            )
        x, hidden, w1, w2 = ctx.saved_tensors
        want_x, want_w1, want_b1, want_w2, want_b2 = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])
        dx = dw1 = db1 = dw2 = db2 = None
        if want_w2:
            active = F.silu(hidden) if ctx.quick else F.gelu(hidden)
            dw2 = _product(None, grad.t(), active, 0, 1 / FACTOR if ctx.quick else 1)
            del active
        if want_b2:
            db2 = grad.sum(0)
        if want_x or want_w1 or want_b1:
            derive = torch.ops.aten.silu_backward if ctx.quick else torch.ops.aten.gelu_backward
            d_hidden = derive(grad @ w2, hidden)  # the factors of both products cancel
            if want_x:
                dx = (d_hidden @ w1).view(ctx.shape)
            if want_w1:
                dw1 = d_hidden.t() @ x.reshape(-1, x.shape[-1])
            if want_b1:
                db1 = d_hidden.sum(0)
        return dx, dw1, db1, dw2, db2, None
