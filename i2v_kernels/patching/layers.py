"""Layers in the manner of the hub's ``kernels``: no state, ``forward`` alone, the signature of the class they stand in for."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn.plain import is_plain
from . import adapter, conv, mlp, shift, timesformer
from .rules import Replacement, Rule
from .watch import is_ordinary

__all__ = ["AIMAdapter", "DepthwiseConv3d", "QuickGELUMLP", "STAdapter", "TemporalShift", "TimesformerLayer"]


def _by(rule: Rule, module: nn.Module, *args: Any) -> Any:
    """What the rule puts in the place of the module's class's own forward, or that."""
    original, found = partial(type(module).forward, module), rule(module)
    if isinstance(found, Replacement) and is_ordinary(args, {}) and is_plain(*map(module.get_submodule, found.uncalled)):
        return found.forward(module, original, *args)
    return original(*args)


class TimesformerLayer(nn.Module):
    """transformers' ``TimesformerLayer`` with divided attention."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        return _by(timesformer.divided_layer, self, hidden_states, output_attentions)


class QuickGELUMLP(nn.Module):
    """``fc1, activation_fn, fc2`` with QuickGELU: transformers' ``CLIPMLP``, ``XCLIPMLP``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _by(mlp.perceptron, self, hidden_states)


class AIMAdapter(nn.Module):
    """AIM's ``Adapter``: ``D_fc1``, ``act``, ``D_fc2``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return _by(adapter.aim_adapter, self, x)


class STAdapter(nn.Module):
    """ST-Adapter's ``Adapter``: ``fc1``, ``conv``, ``fc2``; its input is left as it was."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, T: int) -> Tensor:
        return _by(adapter.st_adapter_module, self, x, T)


class DepthwiseConv3d(nn.Module):
    """``nn.Conv3d``, depthwise and of a size that ``temporal_conv`` knows."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return _by(conv.depthwise_conv3d, self, input)


class TemporalShift(nn.Module):
    """TSM's ``TemporalShift``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return _by(shift.temporal_shift, self, x)
