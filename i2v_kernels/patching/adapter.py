"""AIM's and ST-Adapter's ``Adapter`` wherever they were copied to: known by their parts, proved by a trial."""

from __future__ import annotations

from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor, nn

from ..ops.bottleneck_adapter import bottleneck_adapter
from ..ops.st_adapter import st_adapter
from .conv import depthwise_conv3d
from .mlp import QUICK_GELU
from .rules import Found, Inputs, Replacement, keeps_its_dtype, not_plain, random_like

ACTIVATIONS = {"GELU": "gelu", "ReLU": "relu", "SiLU": "silu", **dict.fromkeys(QUICK_GELU, "quick_gelu")}


def aim_adapter(module: Any) -> Found:
    """``x + D_fc2(act(D_fc1(x)))``, or without x; those of AIM's Swin have no flag that says which, one of them no act."""
    children = [name for name, _ in module.named_children()]
    if not {"D_fc1", "D_fc2"} <= set(children) <= {"D_fc1", "act", "D_fc2"}:
        return None
    if "act" in children and _activation(module) is None:
        return f"its activation is a {module.act}"
    reason = not_plain(module, "D_fc1", "D_fc2", kind=nn.Linear) or not_plain(module, *children)
    if reason is not None:
        return reason
    by, uncalled = "bottleneck_adapter", tuple(children)
    if isinstance(getattr(module, "skip_connect", None), bool):
        return Replacement(_aim, by, _tokens, uncalled=uncalled, reads=("skip_connect",))
    return tuple(Replacement(partial(_aim, skip=skip), by, _tokens, uncalled=uncalled) for skip in (False, True))


def _tokens(module: Any) -> Inputs:
    return (random_like(module, 2, 3, module.D_fc1.in_features),)


def _activation(module: Any) -> str | None:
    """Its name in the op; "" without one."""
    act = getattr(module, "act", None)
    if act is None:
        return ""
    return None if getattr(act, "approximate", "none") != "none" else ACTIVATIONS.get(type(act).__name__)


def _aim(module: Any, original: Any, *args: Any, skip: bool | None = None, **kwargs: Any) -> Any:
    activation, skip = _activation(module), module.skip_connect if skip is None else skip
    if len(args) != 1 or kwargs or activation is None or not isinstance(skip, bool):
        return original(*args, **kwargs)
    x: Tensor = args[0]
    down, up = module.D_fc1, module.D_fc2
    parts = (x, down.weight, down.bias, up.weight, up.bias)
    if skip and keeps_its_dtype(x):
        return bottleneck_adapter(*parts, activation=activation or None)
    update = bottleneck_adapter(*parts, activation=activation or None, residual=False)
    return x + update if skip else update


def st_adapter_module(module: Any) -> Found:
    """``x[:, 1:] += fc2(conv(fc1(x[:, 1:])))`` with ``forward(x, T)``, ``conv`` over clips of a square grid of patches."""
    if {name for name, _ in module.named_children()} != {"fc1", "conv", "fc2"} or not isinstance(module.conv, nn.Conv3d):
        return None
    found = depthwise_conv3d(module.conv)
    if not isinstance(found, Replacement):
        return f"its convolution: {found or 'it is not depthwise'}"
    if module.conv.dilation != (1, 1, 1):
        return f"its convolution: dilation={module.conv.dilation}"
    return (
        not_plain(module, "fc1", "fc2", kind=nn.Linear)
        or not_plain(module, "conv", kind=nn.Conv3d)
        or Replacement(
            _st,
            "st_adapter, which leaves its input as it was",
            lambda m: (random_like(m, 8, 10, m.fc1.in_features), 4),
            uncalled=("fc1", "conv", "fc2"),
        )
    )


def _st(module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    down, conv, up = module.fc1, module.conv, module.fc2
    if (
        len(args) != 2
        or kwargs
        or not isinstance(args[0], Tensor)
        or not isinstance(args[1], int)
        or args[1] < 1
        or args[0].dim() != 3
        or args[0].shape[1] < 2
        or args[0].shape[0] % args[1]
        or isqrt(args[0].shape[1] - 1) ** 2 != args[0].shape[1] - 1
        or not keeps_its_dtype(args[0])
    ):
        return original(*args, **kwargs)
    x, frames = args
    parts = (down.weight, down.bias, conv.weight, conv.bias, up.weight, up.bias)
    side = isqrt(x.shape[1] - 1)
    return st_adapter(x.unflatten(0, (-1, frames)), *parts, grid=(side, side)).flatten(0, 1)
