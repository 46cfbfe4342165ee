"""AIM's and ST-Adapter's ``Adapter`` wherever they were copied to: known by their parts, proved by a trial."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import Tensor, nn

from ..ops.bottleneck_adapter import bottleneck_adapter
from ..ops.st_adapter import st_adapter
from .conv import depthwise_conv3d
from .mlp import QUICK_GELU
from .rules import Replacement, hooked, keeps_its_dtype, not_linear, random_like

ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu", **dict.fromkeys(QUICK_GELU, "quick_gelu")}


def aim_adapter(module: Any) -> Replacement | str | None:
    """``x + D_fc2(act(D_fc1(x)))``, or without x."""
    if {name for name, _ in module.named_children()} != {"D_fc1", "act", "D_fc2"} or not _has_skip(module):
        return None
    if type(module.act).__name__ not in ACTIVATIONS:
        return f"its activation is a {type(module.act).__name__}"
    return not_linear(module.D_fc1, module.D_fc2) or Replacement(
        _aim, "bottleneck_adapter", lambda m: (random_like(m, 2, 3, m.D_fc1.in_features),)
    )


def _has_skip(module: Any) -> bool:
    return isinstance(getattr(module, "skip_connect", None), bool)


def _aim(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    down, up = module.D_fc1, module.D_fc2
    if len(args) != 1 or kwargs or not_linear(down, up) or hooked(down, module.act, up):
        return original(*args, **kwargs)
    x: Tensor = args[0]
    activation = ACTIVATIONS[type(module.act).__name__]
    parts = (x, down.weight, down.bias, up.weight, up.bias)
    if module.skip_connect and keeps_its_dtype(x):
        return bottleneck_adapter(*parts, activation=activation)
    update = bottleneck_adapter(*parts, activation=activation, residual=False)
    return x + update if module.skip_connect else update


def st_adapter_module(module: Any) -> Replacement | str | None:
    """``x[:, 1:] += fc2(conv(fc1(x[:, 1:])))`` with ``forward(x, T)``, ``conv`` over clips of a square grid of patches."""
    if {name for name, _ in module.named_children()} != {"fc1", "conv", "fc2"} or not isinstance(module.conv, nn.Conv3d):
        return None
    found = depthwise_conv3d(module.conv)
    if not isinstance(found, Replacement):
        return f"its convolution: {found or 'it is not depthwise'}"
    if module.conv.dilation != (1, 1, 1):
        return f"its convolution: dilation={module.conv.dilation}"
    return not_linear(module.fc1, module.fc2) or Replacement(
        _st, "st_adapter, which leaves its input as it was", lambda m: (random_like(m, 8, 10, m.fc1.in_features), 4)
    )


def _st(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    down, conv, up = module.fc1, module.conv, module.fc2
    if (
        len(args) != 2
        or kwargs
        or args[0].dim() != 3
        or args[0].shape[0] % args[1]
        or isqrt(args[0].shape[1] - 1) ** 2 != args[0].shape[1] - 1
        or not keeps_its_dtype(args[0])
        or not_linear(down, up)
        or hooked(down, conv, up)
    ):
        return original(*args, **kwargs)
    x, frames = args
    parts = (down.weight, down.bias, conv.weight, conv.bias, up.weight, up.bias)
    side = isqrt(x.shape[1] - 1)
    return st_adapter(x.unflatten(0, (-1, frames)), *parts, grid=(side, side)).flatten(0, 1)
