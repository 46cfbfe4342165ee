"""PEFT's LoRA linears: ``lora_linear`` keeps x alone for backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.lora_linear import lora_linear
from .rules import Replacement, hooked, is_class, random_like


def peft_lora(module: Any) -> Replacement | str | None:
    if not is_class(module, "peft.tuners.lora", "Linear"):
        return None
    base: Any = module.get_base_layer()
    if type(base) is not nn.Linear:
        return f"its base layer is a {type(base).__name__}"
    return Replacement(_forward, "lora_linear", lambda m: (random_like(m, 2, 3, m.in_features),), known=True)


def _forward(module: Any, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    parts = None if args or kwargs or module.disable_adapters or module.merged else _plain(module)
    if parts is None or x.dtype != parts[0].weight.dtype:
        return original(x, *args, **kwargs)
    base, down, up, scaling = parts
    return lora_linear(x, base.weight, down.weight, up.weight, base.bias, scaling=scaling)


def _plain(module: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, float] | None:
    """The parts of the one active adapter, or None if there are more, or something between the products."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or module.lora_variant:
        return None
    name = active[0]
    dropout, parts = module.lora_dropout[name], (module.base_layer, module.lora_A[name], module.lora_B[name])
    if (dropout.training and getattr(dropout, "p", 0) > 0) or hooked(dropout, *parts):
        return None
    if any(type(part) is not nn.Linear or part.weight.dtype != parts[0].weight.dtype for part in parts):
        return None
    if parts[1].bias is not None or parts[2].bias is not None:
        return None
    return (*parts, module.scaling[name])
