"""PEFT's LoRA linears: ``lora_linear`` keeps x alone for backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn.plain import why_not_plain
from ..ops.lora_linear import lora_linear
from .rules import Found, Replacement, drops, is_class, random_like


def peft_lora(module: Any) -> Found:
    if not is_class(module, "peft.tuners.lora", "Linear"):
        return None
    probe = lambda m: (random_like(m, 2, 3, m.in_features),)  # noqa: E731
    return _why_not(module) or Replacement(_forward, "lora_linear", probe, known=True)


def _forward(module: Any, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or x.dtype != module.base_layer.weight.dtype or _why_not(module) is not None:
        return original(x, *args, **kwargs)
    name = _active(module)[0]
    base, down, up, dropout = _parts(module, name)
    if drops(dropout, getattr(dropout, "p", 0.0)):
        return original(x)
    return lora_linear(x, base.weight, down.weight, up.weight, base.bias, scaling=module.scaling[name])


def _active(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _parts(module: Any, name: str) -> tuple[Any, Any, Any, Any]:
    return module.base_layer, module.lora_A[name], module.lora_B[name], module.lora_dropout[name]


def _why_not(module: Any) -> str | None:
    """None where one plain adapter is at work, else what there is, or what stands between the products."""
    if module.disable_adapters or module.merged:
        return f"its adapter is {'merged' if module.merged else 'disabled'}"
    active = _active(module)
    if len(active) != 1:
        return f"{len(active)} of its adapters are active"
    if (variant := module.lora_variant.get(active[0])) is not None:
        return f"its adapter {active[0]!r} is more than LoRA: {type(variant).__name__}"
    base, down, up, dropout = _parts(module, active[0])
    for part, kind in ((base, nn.Linear), (down, nn.Linear), (up, nn.Linear), (dropout, None)):
        if (what := why_not_plain(part, kind)) is not None:
            return f"its {type(part).__name__} {what}"
    if down.bias is not None or up.bias is not None:
        return f"its adapter {active[0]!r} has biases"
    if not down.weight.dtype == up.weight.dtype == base.weight.dtype:
        return f"its base is {base.weight.dtype}, its adapter {down.weight.dtype}"
    return None
