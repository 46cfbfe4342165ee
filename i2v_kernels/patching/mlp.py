"""The perceptron of CLIP's blocks, ``linear -> QuickGELU -> linear``, in OpenAI's, open_clip's and transformers' spelling.

``x * sigmoid(1.702 * x)`` is ``silu(1.702 * x) / 1.702``, and the matrix products before and after take the factors along:
one pass over the hidden layer in place of three, and one tensor of its size kept for backward in place of four.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .rules import Replacement, class_of, hooked, random_like

FACTOR = 1.702
QUICK_GELU = ("QuickGELU", "QuickGELUActivation")


def quick_gelu_mlp(module: Any) -> Replacement | str | None:
    parts = _parts(module)
    if parts is None or type(parts[1]).__name__ not in QUICK_GELU:
        return None
    for linear in (parts[0], parts[2]):
        if type(linear) is not nn.Linear:
            return f"a layer of it is a {type(linear).__name__}, which computes something else than its weight says"
    return Replacement(
        _forward, "one pass of QuickGELU between the products", lambda m: (random_like(m, 2, 5, parts[0].in_features),)
    )


def _parts(module: nn.Module) -> tuple[Any, Any, Any] | None:
    children = dict(module.named_children())
    if class_of(module) is nn.Sequential and len(children) == 3:
        first, activation, second = children.values()
        return first, activation, second
    if set(children) == {"fc1", "activation_fn", "fc2"}:
        return children["fc1"], children["activation_fn"], children["fc2"]
    return None


def _forward(module: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    first, activation, second = _parts(module) or (None, module, None)
    if len(args) != 1 or kwargs or not type(first) is type(second) is nn.Linear or hooked(first, activation, second):
        return original(*args, **kwargs)
    tensors = (args[0], first.weight, first.bias, second.weight, second.bias)
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return _QuickGELUPerceptron.apply(*tensors)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return _QuickGELUPerceptron.apply(*(t if t is None else t.to(dtype) for t in tensors))


def _scaled(bias: Tensor | None, rows: Tensor, matrix: Tensor, beta: float, alpha: float) -> Tensor:
    if bias is None:
        return torch.addmm(rows.new_empty(1), rows, matrix, beta=0, alpha=alpha)
    return torch.addmm(bias, rows, matrix, beta=beta, alpha=alpha)


class _QuickGELUPerceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = _scaled(b1, rows, w1.t(), FACTOR, FACTOR)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, hidden, w1, w2)
            active = F.silu(hidden)
        else:
            active = F.silu(hidden, inplace=True)
        return _scaled(b2, active, w2.t(), 1, 1 / FACTOR).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w1, w2 = ctx.saved_tensors
        want_x, want_w1, want_b1, want_w2, want_b2 = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        dx = dw1 = db1 = dw2 = db2 = None
        if want_w2:
            dw2 = _scaled(None, grad.t(), F.silu(hidden), 0, 1 / FACTOR)
        if want_b2:
            db2 = grad.sum(0)
        if want_x or want_w1 or want_b1:
            d_hidden = torch.ops.aten.silu_backward(grad @ w2, hidden)  # the factors of both products cancel
            if want_x:
                dx = (d_hidden @ w1).view(x.shape)
            if want_w1:
                dw1 = d_hidden.t() @ x.reshape(-1, x.shape[-1])
            if want_b1:
                db1 = d_hidden.sum(0)
        return dx, dw1, db1, dw2, db2
