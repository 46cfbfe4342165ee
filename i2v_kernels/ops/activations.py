"""The activations that ops take by name, and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "quick_gelu", "relu", "silu")

aten = torch.ops.aten


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "relu":
        return F.relu(x)
    return F.silu(x) if activation == "silu" else x


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient before the activation, of that behind it."""
    if activation == "gelu":
        return aten.gelu_backward(grad, x)
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        return grad * (gate + 1.702 * x * gate * (1 - gate))
    if activation == "relu":
        return aten.threshold_backward(grad, x, 0)
    return aten.silu_backward(grad, x) if activation == "silu" else grad
