"""What the modules of attention share: layers of single tokens on tokens as they lie, and the perceptron of CLIP's blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops.activations import activate
from ..ops.layout import memory_order


def in_order(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer(x)`` of a layer of single tokens: ``x [..., C]`` to ``[..., O]``, its dimensions in x's order in memory.

    PyTorch's layers make ``[L, B * T, C]`` that is seen as ``[B, T, L, C]`` contiguous first.
    """
    order, last = memory_order(x), x.dim() - 1
    if order == list(range(last)):
        return layer(x)
    return layer(x.permute(*order, last)).permute(*(order.index(i) for i in range(last)), last)


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """``[B, T, N, C]`` of these tokens one after the other, its dimensions in the order in memory of ``like [B, T, N, C]``."""
    order = (*memory_order(like), 3)
    out = torch.cat([part.permute(order) for part in parts], dim=order.index(2))
    return out.permute([order.index(dim) for dim in range(4)])


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 * x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, "quick_gelu")


def perceptron(channels: int, first: str, activation: str, second: str) -> nn.Sequential:
    """CLIP's, four times as wide within, under these names."""
    layers = (nn.Linear(channels, 4 * channels), QuickGELU(), nn.Linear(4 * channels, channels))
    return nn.Sequential(OrderedDict(zip((first, activation, second), layers)))
